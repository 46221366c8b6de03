"""Linux HMM as a pure library: address spaces, mirrors, range faults and migration, in one process and without I/O.

Everything happens to a `Machine`, by commands; `Local` runs them one at a time and calls drivers in between. Whoever
maps memory, mirrors it and unmaps it sees the contract at work:

    >>> from hmm import commands_device as device, commands_process as process
    >>> from hmm.local import Local
    >>> from hmm.units import PAGE_SIZE, AddressRange
    >>> from hmm.unmapped_area import MapFlag
    >>> from hmm.vma import Prot

    >>> class Gpu:
    ...     def update(self, mirror_id, event):
    ...         print("the driver hears", event.etype.name, event.spans[0])
    ...         return 0
    ...     def release(self, mirror_id):
    ...         print("the driver hears that the process has ended")

    >>> local = Local()
    >>> pid = local.call(process.create_process, "demo")
    >>> flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS
    >>> heap = local.call(process.mmap, pid, 0, 2 * PAGE_SIZE, Prot.READ | Prot.WRITE, flags).address
    >>> local.call(process.write_memory, pid, heap, b"hello").done
    5
    >>> mirror = local.call(device.register_mirror, local.call(device.register_device, "gpu0"), pid)
    >>> local.attach(mirror, Gpu())
    >>> faulted = local.call(device.fault, mirror, [AddressRange(heap, heap + PAGE_SIZE)], write=True)
    the driver hears DEVICE_WFAULT [0x7ffff7ffd000, 0x7ffff7ffe000)
    >>> local.call(device.device_read, mirror, [(heap, 5)])
    b'hello'
    >>> local.call(process.munmap, pid, heap, PAGE_SIZE)
    the driver hears MUNMAP [0x7ffff7ffd000, 0x7ffff7ffe000)
    0
    >>> local.call(process.exit_process, pid)
    the driver hears MUNMAP [0x0, 0x7ffffffff000)
    the driver hears that the process has ended

`hmm.scheduler` runs the same commands in an order that a seed picks; the daemon, `hmm_server`, runs them for clients.

**Source**, **Invariants** and **Absent** stand in each module; ARCHITECTURE.md has the map.
"""
