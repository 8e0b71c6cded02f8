"""What more GPUs can give: a model of a decode step's time over ranks, held against published and measured rows.

    seconds = bytes that one rank reads / sustained bandwidth  +  layers x fixed time  +  2 x layers x all-reduce

Of the weights a rank reads its share; the output head is shared too, or (as in gpt-fast) whole on every rank. The fixed time
of a layer is what its launches cost, whatever their matrices' size: it does not shrink with more ranks. In pipeline stages

    a stage's time = (the above + a row's cost x (rows - 1)) / stages  +  a hop
    a token of one text = stages x a stage's time;  of B rows in G groups = max(stages, G) x that of B / G rows

Four numbers describe a system, and each is fixed by a row that is named; all other rows are predictions.
`python -m llama_fast.ladder.scaling` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llama_fast.model.roofline import GB, cache_bytes_per_step
from llama_ref.checkpoint import expected_shapes
from llama_ref.config import NAMED, LlamaConfig

SHAPES = {
    "7B": NAMED["llama-2-7b"],
    "8B": NAMED["llama-3-8b"],
    "70B": NAMED["llama-2-70b"],
    "405B": LlamaConfig(16384, 126, 128, 8, 128, 53248, 128256, 131072),
}
BYTES = {"bf16": 2, "int8": 1}
POSITIONS = 106  # the mean of a prompt of 6 tokens and 200 new ones


@dataclass(frozen=True)
class System:
    """A program on a machine. Microseconds by number of ranks; `head_split`: whether ranks share the output head."""

    name: str
    bandwidth_gb_per_s: float
    layer_us: float
    all_reduce_us: Mapping[int, float]
    head_split: bool = True
    int8_share: float = 1.0
    """Of the bandwidth: int8 weights are converted before they are multiplied, and that, not the reading, may take the time."""

    def tokens_per_second(self, config: LlamaConfig, encoding: str, ranks: int) -> float:
        """Of one text, batch 1, at `POSITIONS` positions of context."""
        read = rank_bytes(config, BYTES[encoding], ranks, self.head_split)
        launched = config.n_layers * self.layer_us + 2 * config.n_layers * (
            self.all_reduce_us[ranks] if ranks > 1 else 0
        )
        sustained = self.bandwidth_gb_per_s * (self.int8_share if encoding == "int8" else 1.0)
        return 1 / (read / (sustained * GB) + launched * 1e-6)


def rank_bytes(config: LlamaConfig, weight_bytes: int, ranks: int, head_split: bool = True) -> float:
    """Bytes that each of `ranks` reads for a token: matrices, the scales of encoded ones, keys and values; not the norms."""
    total = head = 0.0
    for name, shape in expected_shapes(config).items():
        if len(shape) != 2 or (name == "tok_embeddings.weight" and not config.tie_embeddings):
            continue
        size = shape[0] * shape[1] * weight_bytes + (2 * shape[0] if weight_bytes < 2 else 0)
        is_head = name in ("output.weight", "tok_embeddings.weight")
        head, total = (head + size, total) if is_head else (head, total + size)
    kept = cache_bytes_per_step(config, 1, POSITIONS, 2) / min(ranks, config.n_kv_heads)
    return total / ranks + (head / ranks if head_split else head) + kept


A100 = System("gpt-fast, A100-80 (330 W)", 1611, 41.2, {2: 6.4, 4: 6.8, 8: 8.5}, head_split=False, int8_share=0.81)
"""Bandwidth and fixed time from the rows 7B and 8B on one GPU, all-reduce from 7B on 2, 4 and 8, int8 from its row."""
H200_PUBLIC = System("gpt-fast, H200", 3800, 43.0, {2: 15.2}, head_split=False, int8_share=0.81)
"""Fixed time as of the same program on an H100 (5.66 ms a token less 13.2 GB at 3.09 TB/s), the all-reduce as measured by
itself, int8 as on the A100; bandwidth from the row on one GPU."""
H100_FUSED = System("ours, fused, H100", 3074, 2.4, {}, int8_share=0.89)
"""Bandwidth as measured by itself; fixed time from the row in bf16, int8 from its own."""

SUMS = {2: 1.8, 4: 2.26, 8: 3.0, 16: 35.0, 32: 40.0, 64: 45.0, 128: 50.0}
H200_FUSED = System("ours, fused, H200", 4511, 9.2, SUMS, int8_share=0.79)
"""Bandwidth (the most seen) and the sums on two and four GPUs as measured by themselves; fixed time from the row 7B bf16 on one
GPU, int8 from its own. Beyond four GPUs the sums are assumed: on eight of one host the exchange kernel's with more to send and to
wait for, over hosts NCCL's on InfiniBand."""

ROWS = (
    (A100, "7B", "bf16", 1, 104.9),
    (A100, "7B", "bf16", 2, 168.8),
    (A100, "7B", "bf16", 4, 254.0),
    (A100, "7B", "bf16", 8, 328.4),
    (A100, "8B", "bf16", 1, 93.9),
    (A100, "8B", "bf16", 2, 149.1),
    (A100, "8B", "bf16", 4, 217.2),
    (A100, "8B", "bf16", 8, 276.0),
    (A100, "70B", "bf16", 2, 21.3),
    (A100, "70B", "bf16", 4, 38.0),
    (A100, "70B", "bf16", 8, 62.5),
    (A100, "7B", "int8", 1, 155.6),
    (H200_PUBLIC, "7B", "bf16", 1, 205.4),
    (H200_PUBLIC, "7B", "bf16", 2, 225.8),
    (H200_PUBLIC, "7B", "int8", 2, 250.3),
    (H100_FUSED, "7B", "bf16", 1, 227.7),
    (H100_FUSED, "7B", "int8", 1, 398.8),
    (H200_FUSED, "7B", "bf16", 1, 308.9),
    (H200_FUSED, "7B", "bf16", 2, 523.8),
    (H200_FUSED, "7B", "bf16", 4, 901.7),
    (H200_FUSED, "7B", "int8", 1, 462.4),
    (H200_FUSED, "7B", "int8", 2, 710.1),
    (H200_FUSED, "7B", "int8", 4, 1091.0),
    (H200_FUSED, "70B", "bf16", 2, 58.4),
    (H200_FUSED, "70B", "bf16", 4, 112.0),
    (H200_FUSED, "70B", "int8", 1, 47.3),
    (H200_FUSED, "70B", "int8", 2, 80.5),
    (H200_FUSED, "70B", "int8", 4, 155.2),
)
"""(system, shape, encoding, ranks, tokens/s as published or measured); a test holds them against docs/measurements/."""


def error(row: tuple[System, str, str, int, float]) -> float:
    """The model's, relative to the row: 0.02 is 2% too fast."""
    system, shape, encoding, ranks, seen = row
    return system.tokens_per_second(SHAPES[shape], encoding, ranks) / seen - 1


def checked() -> Iterator[str]:
    """The rows as a table, with the error of each."""
    yield "| system | shape | weights | ranks | tokens/s | model | error |"
    yield "|---|---|---|---|---|---|---|"
    for row in ROWS:
        system, shape, encoding, ranks, seen = row
        rate = system.tokens_per_second(SHAPES[shape], encoding, ranks)
        yield f"| {system.name} | {shape} | {encoding} | {ranks} | {seen} | {rate:.1f} | {error(row):+.1%} |"


def predicted(system: System = H200_FUSED, memory_gb: float = 141) -> Iterator[str]:
    """Tokens/s by shape and number of GPUs, "-" where the weights do not fit or the heads do not divide."""
    counts = [1, *(count for count in system.all_reduce_us if count <= 32)]
    yield f"| shape | weights | {' | '.join(map(str, counts))} |"
    yield "|---|---|" + "---|" * len(counts)
    for shape in ("7B", "70B", "405B"):
        for encoding in BYTES:
            rates = []
            for ranks in counts:
                config = SHAPES[shape]
                fits = rank_bytes(config, BYTES[encoding], ranks) < 0.95 * memory_gb * GB
                divides = config.n_heads % ranks == 0 and config.ffn_dim % ranks == 0
                rates.append(f"{system.tokens_per_second(config, encoding, ranks):.0f}" if fits and divides else "-")
            yield f"| {shape} | {encoding} | {' | '.join(rates)} |"


GPUS_OF_NODE = 8
HOP_US = 25.0
LINK_GB_PER_S = 50.0
"""A message from host to host, and a GPU's share of the network: assumed, for NCCL on InfiniBand of 400 Gbit/s a GPU."""
ROW_US_PER_GB = 3.7
"""What each row beyond the first adds for a GB of weights in bf16: the 7B took 4.39 ms for one row and 7.46 for 64, on an H100
(docs/performance.md). Taken for int8 and the H200 too."""
ROWS_OF_NODE = 64


@dataclass(frozen=True)
class Layout:
    """`replicas` of a model in `stages`, each over `tensor` GPUs."""

    replicas: int
    stages: int
    tensor: int

    def fits(self, config: LlamaConfig, encoding: str, memory_gb: float = 141) -> bool:
        """Whether a rank has room for its weights and some rows, and its part divides."""
        each = replace(config, n_layers=-(-config.n_layers // self.stages))
        divides = config.n_heads % self.tensor == 0 and config.ffn_dim % self.tensor == 0
        return divides and rank_bytes(each, BYTES[encoding], self.tensor) < 0.9 * memory_gb * GB

    def stage_seconds(self, system: System, config: LlamaConfig, encoding: str, rows: float) -> float:
        """Of one stage, for some rows, until the next one has them."""
        more = max(0.0, rows - 1)
        weights_gb = rank_bytes(config, BYTES["bf16"], self.tensor) / GB
        seconds = 1 / system.tokens_per_second(config, encoding, self.tensor) + more * weights_gb * ROW_US_PER_GB * 1e-6
        if self.tensor > GPUS_OF_NODE:  # each sum's numbers go over the network, there and back
            told = 2 * config.n_layers * 2 * more * config.dim * 2
            seconds += told / (GPUS_OF_NODE * LINK_GB_PER_S * GB)
        hop = HOP_US * 1e-6 + rows * config.dim * 2 / (LINK_GB_PER_S * GB) if self.stages > 1 else 0.0
        return seconds / self.stages + hop

    def tokens_per_second(self, system: System, config: LlamaConfig, encoding: str, rows: int = 1) -> float:
        """Of so many texts together."""
        rows_here = rows / self.replicas
        groups = min(max(1.0, rows_here), self.stages)
        of_group = rows_here / groups
        # the last stage tells all others a group's logits, in float32, while it works on
        answer = HOP_US * 1e-6 + of_group * config.vocab_size * 4 / (LINK_GB_PER_S * GB) if self.stages > 1 else 0.0
        round_seconds = self.stages * self.stage_seconds(system, config, encoding, of_group) + answer
        return rows / round_seconds


def over_nodes(shape: str, encoding: str, nodes: int, memory_gb: float) -> dict[str, Layout | None]:
    """The three ways to use nodes of eight GPUs; None where the model does not fit, or divide.

    A replica has as few nodes as hold the model, as stages of one node each.
    """
    config, gpus = SHAPES[shape], GPUS_OF_NODE
    copies = [Layout(nodes // few, few, gpus) for few in (1, 2, 4, 8, 16) if few <= nodes]
    ways = {"tensor": [Layout(1, 1, nodes * gpus)], "stages": [Layout(1, nodes, gpus)], "replicas": copies}
    return {
        name: next((way for way in several if way.fits(config, encoding, memory_gb)), None)
        for name, several in ways.items()
    }


def predicted_over_nodes(system: System, memory_gb: float, shapes: tuple[str, ...]) -> Iterator[str]:
    """Tokens/s of one text, and of 64 texts for each node together; all of it predicted."""
    yield "| shape | weights | nodes | one text: tensor | stages | replicas | 64 a node: tensor | stages | replicas |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for shape in shapes:
        for encoding in BYTES:
            for nodes in (2, 4, 8, 16):
                ways = over_nodes(shape, encoding, nodes, memory_gb).values()
                cells = [
                    "-" if way is None else f"{way.tokens_per_second(system, SHAPES[shape], encoding, rows):,.0f}"
                    for rows in (1, ROWS_OF_NODE * nodes)
                    for way in (ways if rows > 1 else map(alone, ways))
                ]
                yield f"| {shape} | {encoding} | {nodes} | {' | '.join(cells)} |"


def tables_over_nodes() -> Iterator[tuple[str, ...]]:
    """Nodes of H200 GPUs, then of H100 GPUs, on eight of which the 405B in bf16 does not fit."""
    yield tuple(predicted_over_nodes(H200_FUSED, 141, ("70B", "405B")))
    yield tuple(predicted_over_nodes(replace(H100_FUSED, all_reduce_us=SUMS), 80, ("405B",)))


def alone(way: Layout | None) -> Layout | None:
    """What one text has of a layout: one replica."""
    return None if way is None else replace(way, replicas=1)


if __name__ == "__main__":
    print("\n".join([*checked(), "", *predicted(), *(line for table in tables_over_nodes() for line in ("", *table))]))
