// The CPU engine. Torch-free.
#pragma once

#include "../recurrence.h"
#include "kernels.h"

namespace fusedrnn::cpu {

// The best instruction set of this machine, or the one that FUSEDRNN_ISA names.
const InstructionSet& instruction_set();

// Runs a problem on at most `threads` threads and returns when it is done. B, T and H are at
// least 1.
void run(const Problem& problem, int threads);

}  // namespace fusedrnn::cpu
