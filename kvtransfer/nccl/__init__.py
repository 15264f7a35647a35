"""The transport for GPU clusters without RDMA: pairwise NCCL communicators."""
