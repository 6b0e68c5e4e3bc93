// The CPU engine. Torch-free.
#pragma once

#include <string>

#include "../recurrence.h"
#include "kernels.h"

namespace fusedrnn::cpu {

// The instruction set in use; by default the best that this machine supports.
const InstructionSet& instruction_set();

// Selects another instruction set. Returns false if this machine does not support it.
bool use_instruction_set(const std::string& name);

// Runs a problem on at most `threads` threads and returns when it is done. B, T and H must be at
// least 1.
void run(const Problem& problem, int threads);

}  // namespace fusedrnn::cpu
