// Ranks over MPI: host memory, on one machine or several. Here where CMake found an MPI (KATA_MPI).
#pragma once

#include <chrono>
#include <memory>

#include "common/distributed/communicator.hpp"

namespace flashkata {

/// Joins the ranks that one `mpiexec -n W program` started, from the thread that will make all calls. Starts MPI if
/// nobody has, and then ends it with the communicator. No call waits longer than `limit`.
///
/// Ranks that have gone: mpiexec ends the others when one dies or leaves without a farewell. A rank whose exchange
/// failed leaves without a farewell, so nobody waits for it either.
std::unique_ptr<Communicator> connect_by_mpi(std::chrono::milliseconds limit = std::chrono::minutes(5));

/// Ends all ranks at once, with this exit code.
[[noreturn]] void abort_all_ranks(int code);

}  // namespace flashkata
