"""The three losses: supervised, unsupervised, and the regional contrast loss, ReCo (Liu, Zhi,
Johns, Davison, "Bootstrapping Semantic Segmentation with Regional Contrast", ICLR 2022, arXiv
2104.04465).

With several processes, the mean of what they return is the loss of the global batch. All must call
it, whatever their labels hold, since the losses communicate.
"""

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from inputs.files import IGNORE


def supervised_loss(logits: Tensor, label: Tensor, balance: float = 0.0) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0 if there are none.

    logits [B, C, H, W]; label [B, H, W] int64, 255 = ignored; balance: see `class_weights`."""
    weight = class_weights(label, logits.shape[1], balance)
    total = F.cross_entropy(logits, label, weight, ignore_index=IGNORE, reduction="sum")
    return total / mean_count(label != IGNORE)


def unsupervised_loss(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor,
    strong_threshold: float,
    balance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with pseudo-labels, each image weighted by its share of confident pixels
    (paper, section 3.3).

    logits [B, C, H, W]; target [B, H, W] int64, 255 = ignored; confidence [B, H, W]. The loss is
    the mean of eta * cross-entropy over the pixels of the batch whose cross-entropy is positive, 0
    without any; eta [B] = pixels of confidence >= strong_threshold / pixels that are not ignored.
    balance: see `class_weights`. Returns loss and eta."""
    confident = (confidence >= strong_threshold).sum(dim=(1, 2))
    eta = confident / (target != IGNORE).sum(dim=(1, 2)).clamp_min(1)
    weight = class_weights(target, logits.shape[1], balance)
    options = dict(ignore_index=IGNORE, reduction="none")
    cross_entropy = F.cross_entropy(logits, target, weight, **options)
    total = (eta[:, None, None] * cross_entropy).sum()
    return total / mean_count(cross_entropy > 0), eta


def class_weights(label: Tensor, num_classes: int, balance: float) -> Tensor | None:
    """The weight of each class in the cross-entropy, [C]: share^-balance, where share is that of
    the class in the labelled pixels of the global batch; scaled so that a pixel weighs 1 on average
    (not in the paper). None for balance 0: all pixels weigh the same. At 1 all classes do."""
    if not balance:
        return None
    share = add_up(class_shares(label, num_classes)) / world_size()
    weight = share.clamp_min(1e-6) ** -balance
    return weight / (share * weight).sum().clamp_min(1e-6)


def class_shares(label: Tensor, num_classes: int) -> Tensor:
    """The share of each class in the labelled pixels of a batch [B, H, W], [C]."""
    flat = label.flatten()
    count = torch.zeros(IGNORE + 1, device=label.device)
    count = count.scatter_add_(0, flat, torch.ones_like(flat, dtype=count.dtype))[:num_classes]
    return count / count.sum().clamp_min(1)


def mean_count(mask: Tensor) -> Tensor:
    """Number of True pixels, on average over the processes; at least 0.001, to divide by."""
    count = mask.sum().float()
    return (add_up(count) / world_size()).clamp_min(1e-3)


def reco_loss(
    rep: Tensor,
    label: Tensor,
    prob: Tensor,
    valid: Tensor,
    temperature: float = 0.5,
    num_queries: int = 256,
    num_negatives: int = 512,
    strong_threshold: float = 0.97,
    active_queries: bool = True,
    active_keys: bool = True,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The regional contrast loss (paper, section 3.2, with active sampling, section 3.3):

        1/|V| sum over classes c, mean over queries q of -log(P / (P + sum over k of N_k))
        P = exp(cos(q, prototype of c) / temperature), N_k = exp(cos(q, key k) / temperature)

    rep     [B, D, h, w] float: representations, the only input with a gradient
    label   [B, h, w] int64: class of each pixel; a label outside 0 .. C-1 is not valid
    prob    [B, C, h, w] float: the student's softmax probabilities
    valid   [B, h, w] bool: pixels that ReCo uses; V: the classes that have one
    num_queries, num_negatives  Q queries of each class, N negative keys of each query
    strong_threshold  a pixel is hard if its class has a lower probability
    active_queries    False: queries from all valid pixels (ablation)
    active_keys       False: keys from all other classes equally (ablation)
    return_stats      also return a dict: num_classes [] and num_hard [C] over all processes,
                      queries [C, Q] of this process, query_weight [C], relation [C, C]

    Two liberties reduce time and variance, with the paper's expected loss and gradient: the queries
    of a class share their N negative keys, and they are Q evenly spaced hard pixels from a random
    offset. With several processes, prototypes, relations and keys come from all, queries from this
    one. Draws use the global generator of rep's device. No shape depends on values: there is no GPU
    synchronisation. Returns a float32 scalar, 0 if |V| < 2. Raises ValueError for shapes or types
    that do not fit."""
    check_inputs(rep, label, prob, valid)
    C, Q, N = prob.shape[1], num_queries, num_negatives
    with torch.autocast(rep.device.type, enabled=False):
        rows = rearrange(rep.float(), "b d h w -> b (h w) d")  # a view where rep is float32
        with torch.no_grad():
            threshold = strong_threshold if active_queries else torch.inf
            pixels = sort_pixels(label, prob, valid, threshold)
            _, _, own_valid, own_hard = pixels
            (num_valid, num_hard), (before, _) = count_pixels(own_valid, own_hard)  # [C] each

            # 1. prototype of each class: the mean of rep over its valid pixels
            classes = torch.arange(C, device=rep.device)[:, None, None]
            one_hot = valid[:, None] & (label[:, None] == classes)  # [B, C, h, w]
            total = torch.bmm(one_hot.flatten(2).float(), rows).sum(0)  # [C, D]
            prototype = unit(add_up(total) / num_valid.clamp(min=1)[:, None])

            # 2. class relation: row c says how often each other class gives a key of c
            present = num_valid > 0
            relation = class_relation(prototype, present, temperature if active_keys else torch.inf)

            # 3. draw the queries and the negative keys
            queries = draw_queries(pixels, Q)  # [C, Q] indices of pixels
            negatives = draw_keys(rows, pixels, relation, num_valid, before, N)  # [C, N, D]

            # a process counts for a class by its share of the hard pixels
            num_classes = present.sum()
            weight = world_size() * own_hard / num_hard.clamp(min=1) * (num_classes > 1)  # [C]

        # 4. cross-entropy of each query against [positive | negatives], index 0
        query = unit(take(rows, queries)) / temperature  # [C, Q, D]
        keys = torch.cat([prototype[:, None], negatives], dim=1)  # [C, 1 + N, D]
        logits = rearrange(query @ keys.mT, "c q n -> (c q) n")
        target = torch.zeros(C * Q, dtype=torch.int64, device=rep.device)
        losses = F.cross_entropy(logits, target, reduction="none").view(C, Q).mean(dim=1)
        loss = (weight * losses).sum() / num_classes.clamp(min=1)
    if not return_stats:
        return loss
    stats = dict(num_classes=num_classes, num_hard=num_hard, queries=queries)
    return loss, stats | dict(query_weight=weight, relation=relation)


# --------------------------------------------------------------------------- pixels and draws
def check_inputs(rep: Tensor, label: Tensor, prob: Tensor, valid: Tensor) -> None:
    """ValueError for shapes or types that do not fit (reads no values)."""
    if rep.dim() != 4 or rep.numel() == 0 or not rep.is_floating_point():
        raise ValueError(f"rep must be float [B, D, h, w], got {rep.dtype} {list(rep.shape)}")
    shape = (len(rep), *rep.shape[2:])
    for name, x, dtype in (("label", label, torch.int64), ("valid", valid, torch.bool)):
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if prob.dim() != 4 or (len(prob), *prob.shape[2:]) != shape:
        raise ValueError(f"prob must be [B, C, h, w] like {list(shape)}, got {list(prob.shape)}")


Pixels = tuple[Tensor, Tensor, Tensor, Tensor]


def sort_pixels(label: Tensor, prob: Tensor, valid: Tensor, strong_threshold: float) -> Pixels:
    """Sort the pixels: [hard of 0 | easy of 0 | hard of 1 | ... | not valid]. Every set of pixels
    is then a range. Returns their order [B*h*w], and for each class [C] where it starts, how many
    valid and how many hard pixels it has."""
    C = prob.shape[1]
    valid, label = valid & (label >= 0) & (label < C), label.clamp(0, C - 1)
    easy = prob.gather(1, label[:, None])[:, 0].float() >= strong_threshold  # [B, h, w]
    segment = torch.where(valid, 2 * label + easy, 2 * C).flatten().int()
    segment, order = segment.sort(stable=True)
    edge = torch.searchsorted(segment, torch.arange(2 * C + 1, device=label.device).int())
    start = edge[:-1:2]
    return order, start, edge[::2].diff(), edge[1::2] - start


def class_relation(prototype: Tensor, present: Tensor, temperature: float) -> Tensor:
    """prototype [C, D] unit vectors, present [C] bool -> class relation graph [C, C]: softmax over
    the other present classes of cosine / temperature; 0 for absent classes."""
    itself = torch.eye(len(present), dtype=torch.bool, device=present.device)
    other = present[:, None] & present & ~itself
    lowest = torch.finfo(torch.float32).min
    score = (prototype @ prototype.T / temperature).masked_fill(~other, lowest)
    return score.softmax(1) * other


def draw_queries(pixels: Pixels, number: int) -> Tensor:
    """[C, number] hard pixels of each class, evenly spaced from a random offset. Without a hard
    pixel: any pixels, which get weight 0."""
    order, start, _, num_hard = pixels
    offset = torch.rand(len(start), 1, device=order.device)
    u = (torch.arange(number, device=order.device) + offset) / number
    pick = pick_one(u, num_hard[:, None]).clamp(min=0)
    return order[(start[:, None] + pick).clamp(max=len(order) - 1)]


def draw_keys(
    rows: Tensor, pixels: Pixels, relation: Tensor, num_valid: Tensor, before: Tensor, number: int
) -> Tensor:
    """[C, number, D] unit vectors: negative keys of each class. Draws a class by the relation, then
    one of its num_valid [C] valid pixels, of which `before` [C] are on earlier processes."""
    order, start, own, _ = pixels
    u = torch.rand(2, len(start), number, device=order.device)
    if world_size() > 1:
        dist.broadcast(u, src=0)  # all processes draw the same keys
    edges = relation.cumsum(1)
    key_class = torch.searchsorted(edges, u[0] * edges[:, -1:], right=True)
    key_class = key_class.clamp(max=len(start) - 1)  # [C, number]
    pick = pick_one(u[1], num_valid[key_class]) - before[key_class]
    keys = take(rows, order[(start[key_class] + pick).clamp(0, len(order) - 1)])
    if world_size() > 1:  # each process adds its own pixels
        owned = (pick >= 0) & (pick < own[key_class])
        keys = add_up(torch.where(owned[..., None], keys, 0))
    return unit(keys)


def pick_one(u: Tensor, number: Tensor) -> Tensor:
    """Uniform u in [0, 1) -> an index below `number` (int64); -1 if that is 0."""
    return (u * number).long().minimum(number - 1)


def unit(x: Tensor) -> Tensor:
    """Vectors [..., D] scaled to length 1; those near 0 become 0, without gradient."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length < 1e-8, torch.inf)


def take(rows: Tensor, pixel: Tensor) -> Tensor:
    """rows [B, h*w, D], pixel [...] in 0 .. B*h*w - 1 -> [..., D]."""
    return rows[pixel // rows.shape[1], pixel % rows.shape[1]]


# --------------------------------------------------------------------------- several processes
def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def add_up(x: Tensor) -> Tensor:
    """The sum of x over the processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def count_pixels(num_valid: Tensor, num_hard: Tensor) -> tuple[Tensor, Tensor]:
    """Valid and hard pixels of each class [2, C]: over all processes, and over earlier ones."""
    rank = dist.get_rank() if world_size() > 1 else 0
    counts = num_valid.new_zeros(world_size(), 2, len(num_valid))
    counts[rank] = torch.stack([num_valid, num_hard])
    add_up(counts)
    return counts.sum(0), counts[:rank].sum(0)
