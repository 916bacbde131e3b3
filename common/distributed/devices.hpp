// Ranks that have a GPU each and exchange device memory: over NCCL between real GPUs, over MPI between virtual ones.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "common/distributed/communicator.hpp"
#include "common/gpu/launch.hpp"

namespace flashkata {

/// Why not so many ranks can have a GPU each on this machine, and what to do about it; empty if they can. Of virtual
/// GPUs there are as many as are wanted.
std::string why_not_so_many_devices(int ranks);

/// Joins the ranks that one `mpiexec -n W program` started; without mpiexec, or without MPI, it is a group of one. From
/// now on the calling thread works on this rank's GPU: so connect before you allocate anything. All spans are device
/// memory.
///
/// An exchange begins when everything is done that had been launched on `stream` before it. Kernels that are launched
/// afterwards, on this stream or on another, do not wait for it and run beside it, as long as nobody has called wait().
/// When wait(), or a call that returns no Transfer, has returned, the exchange is complete for the host and for
/// everything launched from then on; what was launched in between need not be. So the memory of an exchange follows the
/// rule of Transfer, with "launched" in place of "done": no kernel launched between the two may write what is sent or
/// touch what is received.
std::unique_ptr<Communicator> connect_devices(std::chrono::milliseconds limit = std::chrono::minutes(5),
                                              const Stream& stream = {});

/// A group of one that needs neither MPI nor NCCL.
std::unique_ptr<Communicator> one_device(const Stream& stream = {});

}  // namespace flashkata
