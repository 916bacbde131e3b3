// What the suites of the backward kernels share.
#pragma once

#include "phase3_backward/kernel_suite/calls.hpp"
#include "phase3_backward/kernel_suite/gates.hpp"
#include "phase3_backward/kernel_suite/judgement.hpp"
#include "phase3_backward/kernel_suite/probes.hpp"
