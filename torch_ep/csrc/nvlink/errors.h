// Describes a kernel's FailureReport for an error message.
#pragma once

#include "nvlink/params.h"

#include <string>

namespace ep::nvlink {

// `report`: any failure except too many tokens on this rank, which the host describes with their number.
std::string describe(const std::string& group_name, const Comm& comm, const FailureReport& report);

}  // namespace ep::nvlink
