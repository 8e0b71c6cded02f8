"""The ranks of one replica: actors of Ray's that hold the model together with it, in the replica's placement group."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llama_fast.devices import where
from llama_fast.engine.engine import Engine
from llama_fast.parallel import ranks
from llama_fast.serve.memory import bound_prepared_products
from llama_fast.serve.setup import Setup


@dataclass(frozen=True)
class Share:
    """What of a machine a rank has."""

    cpus: int
    gpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray spells it, for one bundle of a placement group."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Seat:
    """Where a rank is: its node, and the GPUs there that Ray gave it."""

    node: str
    gpus: tuple[str, ...]

    @classmethod
    def mine(cls) -> Seat:
        """That of this process."""
        context = ray.get_runtime_context()
        return cls(context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ())))


def environments(seats: Sequence[Seat], address: str, port: int) -> list[dict[str, str]]:
    """What a launcher would tell each rank. Ranks of one node see all their GPUs, so that these reach each other's memory."""
    told = []
    for rank, seat in enumerate(seats):
        here = [other for other, found in enumerate(seats) if found.node == seat.node]
        variables = {
            "RANK": rank,
            "WORLD_SIZE": len(seats),
            "LOCAL_RANK": here.index(rank),
            "LOCAL_WORLD_SIZE": len(here),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        if seat.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in here for gpu in seats[other].gpus)
        told.append({name: str(value) for name, value in variables.items()})
    return told


class Rank:
    """A rank after the first: it does what the first rank's engine does, until that is closed."""

    def seat(self) -> Seat:
        return Seat.mine()

    def follow(self, setup: Setup, environment: dict[str, str], cpus: int) -> None:
        from llama_fast.parallel.orders import Orders
        from llama_fast.serve.following import follow

        os.environ.update(environment)  # before the first call of CUDA, which reads what is visible
        torch.set_num_threads(cpus)
        bound_prepared_products()
        llama, slots = setup.opened(ranks.join(where(setup.device)))
        follow(Engine(llama.runner, **slots), Orders(), llama)


class Group:
    """This process and the actors of the other ranks. They end when it does, because it owns them."""

    def __init__(self, setup: Setup, share: Share, others: Sequence[Any], told: Sequence[dict[str, str]]):
        self._setup, self._share, self._others, self._told = setup, share, others, told
        self._following: set[asyncio.Future[None]] = set()

    @classmethod
    async def gathered(cls, setup: Setup, size: int, share: Share) -> Group:
        """The actors of ranks 1 and following, one in each bundle of the placement group behind the first."""
        if size == 1:
            return cls(setup, share, (), ())
        bundles = ray.util.get_current_placement_group()
        others = [
            ray.remote(Rank)
            .options(
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            )
            .remote()
            for rank in range(1, size)
        ]
        seats = [Seat.mine(), *await asyncio.gather(*(rank.seat.remote() for rank in others))]
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return cls(setup, share, others, environments(seats, ray.util.get_node_ip_address(), port))

    def follow(self, on_end: Callable[[str], None]) -> None:
        """Have the other ranks join and follow; `on_end` is called, with the reason, when one of them stops."""

        async def watched(number: int, rank: Any, environment: dict[str, str]) -> None:
            try:
                await rank.follow.remote(self._setup, environment, self._share.cpus)
            except Exception as error:
                on_end(f"rank {number} has failed: {ranks.first_line(error)}")
            else:
                on_end(f"rank {number} has ended")

        for number, (rank, environment) in enumerate(zip(self._others, self._told[1:]), 1):
            self._following.add(asyncio.ensure_future(watched(number, rank, environment)))

    def join(self) -> ranks.Member:
        """This process as the first rank; alone, where there is no other."""
        if self._told:
            os.environ.update(self._told[0])
        return ranks.join(where(self._setup.device))
