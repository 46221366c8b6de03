"""Drivers that run: each a worked example of `hmm_client`, each a fake device for tests and demonstrations.

    dummy      the dummy driver of the 2015 series: a page table of its own, read and write as its test suite wants them
    rdma       a network card that translates by DMA address and faults on demand
    prefetch   a device that follows a program around and checks everything it sees
    dmirror    the kernel's own test driver with its ioctls, over today's interface, or in the model's process

All are programs: `python -m hmm_client.drivers.dummy --help`.
"""
