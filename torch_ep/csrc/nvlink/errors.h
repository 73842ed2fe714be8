// Describes a kernel's FailureReport for an error message.
#pragma once

#include "nvlink/params.h"

#include <string>

namespace ep::nvlink {

// `report`: not of too many tokens of this rank, of which its host knows more.
std::string describe(const std::string& group_name, const Comm& comm, const FailureReport& report);

}  // namespace ep::nvlink
