// Ranks over NCCL: the memory of GPUs, one process a GPU, on one machine or several. Here where CMake found MPI and
// NCCL (KATA_MPI, KATA_NCCL) and kernels run on real GPUs.
#pragma once

#include <chrono>
#include <memory>

#include "common/distributed/communicator.hpp"
#include "common/gpu/launch.hpp"

namespace flashkata {

/// Joins the ranks that one `mpiexec -n W program` started, from the thread that will make all calls: from now on it
/// works on this rank's GPU, which is that of the same number among the ranks of this machine. Throws
/// CommunicationError if two ranks would have the same GPU.
///
/// MPI carries what is a few bytes long: who is there, and before each call what everybody is about to send; so sizes
/// and calls that differ are found before anything moves. It needs all ranks to come to the call: no call of this
/// communicator, shift() included, returns before every rank has made it. No call waits for others longer than `limit`,
/// or, connecting, than half a minute where that is longer. What is on its way when a rank gives up is aborted.
///
/// When exchanges begin and are over: see connect_devices(). They run on a stream of their own, which goes before the
/// others wherever thread blocks of both wait for a place.
///
/// NVLink multicast (NCCL_NVLS_ENABLE) is off, unless the environment says otherwise.
///
/// NCCL has threads of its own beside each rank's, so do not tie ranks to a core each; with Open MPI:
///     mpiexec --bind-to none -n W program
std::unique_ptr<Communicator> connect_by_nccl(std::chrono::milliseconds limit = std::chrono::minutes(5),
                                              const Stream& stream = {});

}  // namespace flashkata
