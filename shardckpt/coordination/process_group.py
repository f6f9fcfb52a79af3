"""Start a process group of torch.distributed from the ranks of MPI or SLURM."""

from __future__ import annotations

import datetime
import importlib
import os
import socket
from contextlib import suppress
from typing import Any

import msgspec
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from shardckpt.config import current
from shardckpt.coordination.deadlines import rank_failed
from shardckpt.coordination.exchange import exchange
from shardckpt.coordination.mpi.launch import Launch, mpi_launch, several_ranks, slurm_launch
from shardckpt.coordination.resolve import is_alone, operation
from shardckpt.coordination.shutdown import destroy_groups_at_exit
from shardckpt.errors import CoordinationError, DependencyError
from shardckpt.io.devices import accelerator, group_backends

__all__ = ["group_for_dcp", "init_from_mpi"]

_CONNECT_S = 3.0
_store: Any = dist.TCPStore  # type: ignore[attr-defined]


class _StoreAddress(msgspec.Struct, array_like=True):
    """The address of the store of rank 0: host addresses to try in turn, and a port."""

    hosts: list[str]
    port: int
    local_ranks: list[int]
    one_host: bool


def init_from_mpi(
    backend: str | None = None, *, comm: Any = None, timeout_s: float = 1800.0
) -> None:
    """Start the default process group of torch.distributed from the ranks of MPI. Collective.

    For FSDP2 and DDP scripts under mpirun: call it in place of init_process_group. Under srun
    without MPI the ranks come from SLURM's variables. Rank 0 opens the store of torch.distributed
    on a free port and announces it by MPI. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are set as torchrun sets them. The group is destroyed when the process ends. If
    there is a default group already, nothing happens.

    Args:
        backend: The backend of the group: by default gloo, with nccl for CUDA or another
            backend for another accelerator.
        comm: The ranks, as an mpi4py communicator; by default MPI.COMM_WORLD.
        timeout_s: Seconds until a collective of the group fails.

    Raises:
        CoordinationError: Neither mpirun nor srun started this process, a rank failed, or a rank
            can't connect.

    Example:
        >>> import shardckpt
        >>> shardckpt.init_from_mpi()  # doctest: +SKIP
    """
    if dist.is_initialized():
        return
    backend = backend or group_backends(accelerator.kind())
    timeout = datetime.timedelta(seconds=timeout_s)
    slurm = slurm_launch()
    if comm is None and mpi_launch() is None and slurm is not None:
        rank, world_size, store = slurm.rank, slurm.world_size, _slurm_store(slurm)
    else:
        rank, world_size, store = _mpi_store(comm)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("shardckpt", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise CoordinationError(
            "torch.distributed could not start a process group",
            rank=rank,
            actual=str(error).splitlines()[0],
            remedy="read the logs of the other ranks; set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
            "to the network to use",
        ) from error
    destroy_groups_at_exit()


def group_for_dcp(path: str | None, *, comm: Any = None) -> None:
    """Start a process group if mpirun or srun started several ranks and they have none. Collective.

    Without a group, torch.distributed.checkpoint would treat each rank as the only one. Raises
    CoordinationError if `comm` is given, which DCP can't use.
    """
    if comm is not None:
        raise CoordinationError(
            "torch.distributed.checkpoint and its planners do not support MPI communicators",
            path=path,
            expected="a process group of torch.distributed",
            actual="comm=",
            remedy="leave out comm=; shardckpt.init_from_mpi(comm=...) starts a process group",
        )
    if several_ranks() is not None and not is_alone():
        init_from_mpi()


def _mpi_store(comm: Any) -> tuple[int, int, Any]:
    """Return rank, world size, and a store that all ranks have connected to. Collective over
    MPI.
    """
    opened: list[Any] = []

    with operation("init_from_mpi", comm=comm) as coordinator:
        launch = mpi_launch()
        if coordinator.world_size == 1 and comm is None and launch is None:
            raise CoordinationError(
                "Neither mpirun nor srun started this process",
                expected="several ranks, or comm=",
                actual="one process",
                remedy="run mpirun -n 4 python SCRIPT, or call init_process_group",
            )

        def announce(host_ids: list[bytes]) -> bytes:
            opened.append(_serve(int(os.environ.get("MASTER_PORT", "0"))))
            return msgspec.msgpack.encode(_store_address(opened[0], host_ids))

        answer = exchange(coordinator, "address", _host_id, announce)
        address = msgspec.msgpack.decode(answer, type=_StoreAddress)
        hosts = ["127.0.0.1"] if address.one_host else address.hosts

        def connect() -> bytes:
            host = hosts[0] if hosts else ""
            if coordinator.rank:
                host = _reachable(hosts, address.port, one_host=address.one_host)
                opened.append(_client(host, address.port))
            local_rank = launch.local_rank if launch and launch.local_rank is not None else None
            _export(
                coordinator.rank,
                coordinator.world_size,
                address.local_ranks[coordinator.rank] if local_rank is None else local_rank,
                host,
                address.port,
            )
            return host.encode()

        host = exchange(coordinator, "connect", connect, lambda hosts: hosts[-1])
        if coordinator.rank == 0 and not address.one_host:
            _use_network(host.decode())
        return coordinator.rank, coordinator.world_size, opened[0]


def _host_id() -> bytes:
    """Return a text that distinguishes hosts, and containers on one host."""
    # The boot id differs between machines, the addresses between containers.
    return "\n".join([socket.gethostname(), _boot_id(), *_addresses()]).encode()


def _store_address(store: Any, host_ids: list[bytes]) -> _StoreAddress:
    """Describe the store of rank 0, given the host id of each rank."""
    address = os.environ.get("MASTER_ADDR")
    return _StoreAddress(
        hosts=[address] if address else _addresses(),
        port=store.port,
        local_ranks=[host_ids[:rank].count(host) for rank, host in enumerate(host_ids)],
        one_host=len(set(host_ids)) == 1,
    )


def _slurm_store(slurm: Launch) -> Any:
    """Return the store of processes that srun started without MPI. Job and step give the port."""
    job, step = (int(os.environ.get(f"SLURM_{name}", "0") or 0) for name in ("JOB_ID", "STEP_ID"))
    port = int(os.environ.get("MASTER_PORT", "0")) or 20_000 + (job * 64 + step) % 12_000
    host = os.environ.get("MASTER_ADDR") or slurm.host or "127.0.0.1"
    _export(slurm.rank, slurm.world_size, slurm.local_rank or 0, host, port)
    if slurm.rank == 0:
        return _serve(port)
    wait = datetime.timedelta(seconds=current().arrival_deadline_s)
    try:
        return _client(host, port, wait)
    except dist.DistError as error:
        raise rank_failed([0], "connect", str(error).splitlines()[0]) from error


def _serve(port: int) -> Any:
    try:
        return _store("0.0.0.0", port, is_master=True, wait_for_workers=False)
    except dist.DistError as error:
        raise CoordinationError(
            "Rank 0 can't open its store",
            rank=0,
            expected=f"port {port} to be free" if port else "a free port",
            actual=str(error).splitlines()[0],
            remedy="unset MASTER_PORT, or set it to a free port",
        ) from error


def _client(
    host: str, port: int, timeout: datetime.timedelta = datetime.timedelta(seconds=60)
) -> Any:
    return _store(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _export(rank: int, world_size: int, local_rank: int, host: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )


def _reachable(hosts: list[str], port: int, *, one_host: bool) -> str:
    """Return the first address of rank 0 that answers."""
    for host in hosts:
        with suppress(OSError), socket.create_connection((host, port), _CONNECT_S) as connection:
            if not one_host:
                _use_network(connection.getsockname()[0])
            return host
    raise CoordinationError(
        "This rank can't reach rank 0",
        expected=f"an answer at port {port} of {', '.join(hosts) or 'its host'}",
        actual="no answer",
        remedy="set MASTER_ADDR on rank 0 to an address that all hosts reach; open its ports",
    )


def _use_network(address: str) -> None:
    """Make gloo use the network that reaches rank 0. By default it uses that of the host name."""
    for name, interface_address in _interfaces():
        if interface_address == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _addresses() -> list[str]:
    """List the IPv4 addresses of this host. The address of its name comes first."""
    addresses = [address for _, address in _interfaces() if not address.startswith("127.")]
    with suppress(OSError):  # the name of the host may not resolve
        named = socket.gethostbyname(socket.gethostname())
        addresses.sort(key=lambda address: address != named)
    return addresses


def _interfaces() -> list[tuple[str, str]]:
    """List (name, IPv4 address) of the network interfaces with an address."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError as error:
        raise DependencyError(
            "This process is a rank of an MPI job, but psutil is not installed",
            expected="psutil, which lists the network interfaces of this host",
            actual=str(error),
            remedy='pip install "shardckpt[mpi]"',
        ) from error
    return [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]


def _boot_id() -> str:
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""
