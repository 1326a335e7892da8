"""KV blocks between two processes' GPU memory on one host, moved by one kernel of our own.

NIXL and UCX move a list of blocks as one copy a block, and each copy costs some ten microseconds: with 32 KiB blocks
that is a few GB/s of the 1500 that the memory can do. Here decode opens prefill's pool through a CUDA IPC handle
(`ipc`), and one kernel reads all blocks from it and writes them into decode's own pool (`copy`, `kernels`), between
pools of the same layout or of different ones (`view`), with a checksum a block in the same pass (`checksum`).

`store` is a worker's pool as the transfer agent sees it, and `paths.gpu` the path; `lane` is the stream of a transfer.
`checksum`, `view` and the description in `ipc` are plain numpy and run anywhere. `copy` needs torch and Triton,
`ipc.export` and `ipc.Mapping` need NVIDIA's driver; what is missing is said with the fix, when it is first used.
"""
