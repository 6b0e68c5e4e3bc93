#pragma once

namespace fusedrnn {

// Whether tensors may have tangents. torch.autograd.forward_ad cannot be used for this, because
// compiled code enters forward mode without updating it.
bool forward_mode();

}  // namespace fusedrnn
