// The CPU engine. Torch-free.
#pragma once

#include <string>

#include "../recurrence.h"
#include "kernels.h"

namespace fusedrnn::cpu {

// The instruction set in use: at first the best that this machine has.
const InstructionSet& instruction_set();

// Uses another; false if this machine does not have it.
bool use_instruction_set(const std::string& name);

// Runs a problem on at most `threads` threads and returns when it is done. B, T and H are at
// least 1.
void run(const Problem& problem, int threads);

}  // namespace fusedrnn::cpu
