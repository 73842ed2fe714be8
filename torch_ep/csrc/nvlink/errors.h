// What a kernel has reported, in words.
#pragma once

#include "nvlink/params.h"

#include <string>

namespace ep::nvlink {

// `report`: of a rank's mailbox; not of too many tokens of its own, which its host knows more of.
std::string describe(const std::string& group_name, const Comm& comm, const HostReport& report);

}  // namespace ep::nvlink
