#pragma once

namespace fusedrnn {

// Whether tensors may have tangents. The level that torch.autograd.forward_ad records cannot be
// used for this, because compiled code enters forward mode without updating it.
bool forward_mode();

}  // namespace fusedrnn
