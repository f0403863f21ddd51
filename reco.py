"""The regional contrast loss, ReCo (Liu, Zhi, Johns, Davison, "Bootstrapping Semantic Segmentation
with Regional Contrast", ICLR 2022, arXiv 2104.04465): hard pixels of a class (active queries) are
pulled to the class mean (prototype) and pushed from pixels of the classes most like it (active
negative keys).

What is drawn. Marginally every query and every set of N keys has the paper's law, so loss and
gradient have the paper's expectation. Two liberties are taken with what is drawn *together*, one
for speed, one against variance:
- the queries of a class share its N negative keys, so the logits of a class are one
  [Q, D] x [D, 1 + N] product;
- the queries of a class are Q evenly spaced picks with a random offset from its hard pixels, not Q
  separate draws.
The N keys of a query stay independent draws: spreading them evenly too would change the mean loss,
since the log of a sum is concave (by +0.09 of 3.99 at temperature 0.1 with N 16).
`sampling="independent"` takes neither liberty.

Several processes. The loss is that of the whole batch: prototypes, classes present, relation graph
and negative keys come from the pixels of all processes; queries are local, and weighted so that the
mean over processes (of the loss, and of the gradient, which DDP averages) is in expectation what
one process with the whole batch would get. Every process makes the same collectives whatever its
labels hold, so none waits for another. Payload at 19 classes, D 256, N 512, float32: sums and
counts 20 kB, uniforms 78 kB, keys 19*512*256*4 = 10.0 MB.

Cost, at rep 4x256x128x128, 19 classes, Q 256, N 512, float32. Memory: rep is read once for the
prototypes (67 MB), C*(Q+N) = 14,592 vectors are gathered (15 MB; each number lies on a cache line
of its own, so 0.24 GB travel), the gradient is filled once (67 MB). Arithmetic: prototypes
2*n*C*D = 0.64 GFLOP, logits and their gradient 2 * 2*C*Q*(N+1)*D = 2.55 GFLOP. Predicted from
timing those parts alone on 2 CPU cores: 90 ms forward and backward. What was measured stands in
docs/speed.md. Classes are worked off in blocks, so that the memory beside rep and its gradient
hardly grows with their number.
On a GPU: no shape and no branch depends on a tensor's values, so the host never
waits for the device.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

EPS = 1e-8  # a shorter vector has no direction: cosine 0, gradient 0


def reco_loss(
    rep,
    label,
    prob,
    valid,
    temperature=0.5,
    num_queries=256,
    num_negatives=512,
    strong_threshold=0.97,
    sampling="stratified",
    active_keys=True,
    return_stats=False,
):
    """The ReCo loss of a batch (the paper's pixel-level contrast, with active hard sampling of
    queries and keys).

    rep    [B, D, h, w] float32, bfloat16 or float16: representations, the only input that gets a
           gradient.
    label  [B, h, w] int64: class of each pixel; a label outside 0 .. C-1 (255, -1) is not valid.
    prob   [B, C, h, w] float: softmax probabilities; a pixel is hard if that of its own class is
           below strong_threshold (above 1: every pixel is, which gives the paper's random queries).
    valid  [B, h, w] bool: pixels that take part.
    sampling      "stratified" (module docstring) or "independent" (the paper's plain draws, slower,
                  one process only).
    active_keys   False: negative classes uniformly among the others present, not by their relation
                  (ablation).
    return_stats  also return a dict of tensors: num_classes [] classes present and num_hard [C]
                  hard pixels, both over all processes; queries [C, Q] index into the B*h*w pixels
                  of this process; query_weight [C], 0 where the class contributes nothing here;
                  relation [C, C] probability of each negative class (row: query class), 0 for an
                  absent one.

    Returns a float32 scalar: 0, with zero gradient, where fewer than two classes are present. With
    torch.distributed initialised all processes must call it; the value is this process's share,
    whose mean over processes is the loss. Randomness is the global generator of rep's device.
    Raises ValueError on shapes, types or options that do not fit.
    """
    check_inputs(rep, label, prob, valid, temperature, num_queries, num_negatives, sampling)
    D, (C, Q, N) = rep.shape[1], (prob.shape[1], num_queries, num_negatives)
    stratified, device = sampling == "stratified", rep.device
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if several and not stratified:
        raise ValueError(
            'sampling="independent" runs in one process only: its keys are too many to exchange'
        )

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        order, start, num_valid, num_hard = sort_pixels(label, prob, valid, strong_threshold)
        rows = rearrange(rep.float(), "b d h w -> b (h w) d")  # a view if rep is float32

        # ---- Prototypes: the mean representation of a class over all its valid pixels: the
        # positive key.
        class_sum = sum_by_class(rows, label, valid, C)  # [C, D]
        counts = torch.zeros(world, 2, C, device=device)  # float32: exact up to 16.7 million
        counts[rank] = torch.stack([num_valid, num_hard])
        if several:
            shared = torch.cat([class_sum.flatten(), counts.flatten()])
            dist.all_reduce(shared)
            class_sum, counts = shared[: C * D].view(C, D), shared[C * D :].view(world, 2, C)
        all_valid, all_hard = counts.long().sum(0)  # [C] over all processes
        owned_from = counts[:rank, 0].sum(0).long()  # [C] valid pixels of earlier processes
        mean = class_sum / all_valid.clamp(min=1)[:, None]
        prototype = F.normalize(mean, dim=1, eps=EPS)  # only cosines are taken

        # ---- Class relation graph: how alike two prototypes are; row c says where the negative
        # keys of c come from.
        present = all_valid > 0
        num_classes = present.sum()  # |V|
        relation_temperature = temperature if active_keys else float("inf")
        relation = class_relation(prototype, present, relation_temperature)  # [C, C]

        # ---- Active queries: hard pixels of each class, with replacement.
        if stratified:
            u = (torch.arange(Q, device=device) + torch.rand(C, 1, device=device)) / Q
        else:
            u = torch.rand(C, Q, device=device)
        pick = pick_one(u, num_hard[:, None]).clamp(min=0)  # [C, Q]
        queries = order[(start[:, None] + pick).clamp(max=len(order) - 1)]  # [C, Q] pixels
        # A process holding a share of the hard pixels of a class speaks for that share (world: the
        # mean divides by it). The loss is the mean over the queries of a class, then over the
        # classes present, with hard pixels or without.
        query_weight = world * num_hard / all_hard.clamp(min=1) * (num_classes > 1)  # [C]
        weight = query_weight / num_classes.clamp(min=1) / Q

        # ---- Contrast, in groups of queries that share their keys: all of a class, or
        # (independent) each one alone. Blocks of groups bound the memory.
        groups = C if stratified else C * Q
        block = max(1, 2**21 // (N * D)) if stratified else 32
        if stratified:
            u = torch.rand(2, C, N, device=device)
            if several:
                dist.broadcast(u, src=0)  # all processes mean the same keys
        else:
            rows = rows.contiguous()  # far more gathers than pixels: copy once
        loss = rows.new_zeros(C, Q)
        grad = rows.new_empty(groups, C * Q // groups, D)
        group_class = torch.arange(groups, device=device) // (groups // C)  # [G]
        group_queries = queries.view(groups, -1)  # [G, Q or 1]
        cumulative = relation.cumsum(1)  # [C, C]
        for first in range(0, groups, block):
            g = slice(first, first + block)
            c = group_class[g]  # [g] class of each group
            # Active keys: first a class by its relation to c, then one of its valid pixels, N
            # times.
            draw = u[:, g] if stratified else torch.rand(2, len(c), N, device=device)
            edges = cumulative[c]  # [g, C]
            key_class = torch.searchsorted(edges, draw[0] * edges[:, -1:], right=True)
            key_class = key_class.clamp(max=C - 1)  # [g, N]
            pick = pick_one(draw[1], all_valid[key_class]) - owned_from[key_class]
            pixel = order[(start[key_class] + pick).clamp(0, len(order) - 1)]
            negative = take(rows, pixel)  # [g, N, D]
            if several:  # the owner of a pixel fills it in
                owned = (pick >= 0) & (pick < num_valid[key_class])
                negative = torch.where(owned[..., None], negative, 0)
                dist.all_reduce(negative)
            positive = prototype[c, None]
            keys = torch.cat([positive, F.normalize(negative, dim=2, eps=EPS)], dim=1)
            query_loss, query_grad = contrast(take(rows, group_queries[g]), keys, temperature)
            loss.view(groups, -1)[g] = query_loss
            w = weight[c, None, None]
            grad[g] = torch.where(w > 0, query_grad * w, 0)
        loss = torch.where(weight > 0, query_weight / num_classes.clamp(min=1) * loss.mean(1), 0)

    loss = WithGradient.apply(rep, loss.sum(), queries.flatten(), grad.view(C * Q, D))
    if not return_stats:
        return loss
    return loss, dict(
        num_classes=num_classes,
        num_hard=all_hard,
        queries=queries,
        query_weight=query_weight,
        relation=relation,
    )


def check_inputs(rep, label, prob, valid, temperature, num_queries, num_negatives, sampling):
    """Raise ValueError, in one line, on inputs of reco_loss that do not fit (reads no tensor
    values)."""
    if rep.dim() != 4 or rep.numel() == 0 or not rep.is_floating_point():
        raise ValueError(
            f"rep must be a non-empty float tensor [B, D, h, w], got {rep.dtype} {list(rep.shape)}"
        )
    B, _, h, w = rep.shape
    if prob.dim() != 4 or prob.shape[:1] + prob.shape[2:] != (B, h, w):
        raise ValueError(f"prob must be [B, C, h, w] = [{B}, C, {h}, {w}], got {list(prob.shape)}")
    for name, tensor, dtype in (("label", label, torch.int64), ("valid", valid, torch.bool)):
        if tensor.shape != (B, h, w) or tensor.dtype != dtype:
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} must be {kind} [{B}, {h}, {w}], got {tensor.dtype} {list(tensor.shape)}"
            )
    if temperature <= 0 or num_queries < 1 or num_negatives < 1:
        raise ValueError(
            "temperature must be positive, num_queries and num_negatives at least 1, got "
            f"{temperature}, {num_queries}, {num_negatives}"
        )
    if sampling not in ("stratified", "independent"):
        raise ValueError(f'sampling must be "stratified" or "independent", got {sampling!r}')


def sort_pixels(label, prob, valid, strong_threshold):
    """The pixels by class, by one stable sort: [hard of 0 | easy of 0 | hard of 1 | ... | not
    valid]. Every set of pixels is then a stretch of this order: no masks, whose sizes the host
    would wait for.

    Inputs as in reco_loss -> order [B*h*w], and per class [C]: where its stretch starts, its valid
    and its hard pixels."""
    C = prob.shape[1]
    valid, label = valid & (label >= 0) & (label < C), label.clamp(0, C - 1)  # safe to index with
    easy = prob.gather(1, label[:, None])[:, 0].float() >= strong_threshold  # [B, h, w]
    segment = torch.where(valid, 2 * label + easy, 2 * C).flatten().int()
    segment, order = segment.sort(stable=True)
    borders = torch.arange(2 * C + 1, dtype=torch.int32, device=label.device)
    edge = torch.searchsorted(segment, borders)
    start = edge[:-1:2]
    return order, start, edge[::2].diff(), edge[1::2] - start


def sum_by_class(rows, label, valid, num_classes):
    """Sum of the representations of each class's valid pixels: rows [B, h*w, D] -> [C, D]."""
    classes = torch.arange(num_classes, device=label.device).view(-1, 1, 1)
    one_hot = valid[:, None] & (label[:, None] == classes)  # [B, C, h, w]
    return torch.bmm(one_hot.flatten(2).float(), rows).sum(0)


def class_relation(prototype, present, temperature):
    """Class relation graph (active key sampling): softmax of the prototypes' cosine / temperature
    over the others present.

    prototype [C, D] float32 unit vectors, present [C] bool -> [C, C] float32, rows and columns of
    absent classes 0."""
    itself = torch.eye(len(present), dtype=torch.bool, device=present.device)
    other = present[:, None] & present & ~itself
    lowest = torch.finfo(torch.float32).min
    score = (prototype @ prototype.T / temperature).masked_fill(~other, lowest)
    return score.softmax(1) * other


def pick_one(u, number):
    """Uniform u in [0, 1) -> an index below `number` (int64), -1 where there is none."""
    return (u * number).long().minimum(number - 1)


def contrast(query, keys, temperature):
    """Cross-entropy of each query against its keys, the first being the positive one (the ReCo
    loss), and its gradient.

    query [g, q, D] float32; keys [g, 1 + N, D] float32 unit vectors -> loss [g, q], d loss / d
    query [g, q, D]. With z the unit query, p the softmax of z.keys / temperature and e the one-hot
    of the positive key, dloss/dz = (p - e) keys / temperature; what points along z only changes
    the query's length and is taken out."""
    length = query.norm(dim=2, keepdim=True)
    z = query / length.clamp(min=EPS)
    logits = torch.bmm(z / temperature, keys.mT)  # [g, q, 1 + N]
    positive = logits[..., :1].clone()
    highest = logits.amax(2, keepdim=True)
    exponential = logits.sub_(highest).exp_()  # in place: the one large tensor here
    total = exponential.sum(2, keepdim=True)  # p = exponential / total
    loss = (highest + total.log() - positive).squeeze(2)
    grad = (torch.bmm(exponential, keys) / total - keys[:, :1]) / temperature  # [g, q, D]
    grad = (grad - (grad * z).sum(2, keepdim=True) * z) / length.clamp(min=EPS)
    return loss, torch.where(length > EPS, grad, 0)


def take(rows, pixel):
    """The vectors of the given pixels: rows [B, h*w, D] (any strides), pixel [...] index into
    B*h*w -> [..., D]."""
    return rows[pixel // rows.shape[1], pixel % rows.shape[1]]


class WithGradient(torch.autograd.Function):
    """loss [], whose gradient with respect to rep [B, D, h, w] is grad [M, D] added up at pixel
    [M]; zero elsewhere."""

    @staticmethod
    def forward(ctx, rep, loss, pixel, grad):
        ctx.save_for_backward(pixel, grad)
        ctx.shape, ctx.dtype = rep.shape, rep.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        pixel, grad = ctx.saved_tensors
        B, D, h, w = ctx.shape
        rep_grad = grad.new_zeros(B * D * h * w)
        # Into a flat buffer, channel by channel as it lies in memory: a pixel drawn more than once
        # adds up, in float32 and on a CPU in a fixed order (scatter_add_ in one dimension is
        # serial there). Some channels at a time, or the indices would take twice grad's memory.
        first = pixel // (h * w) * (D * h * w) + pixel % (h * w)  # [M] channel 0 of each pixel
        for channels in torch.arange(D, device=pixel.device).split(64):
            index = first + h * w * channels[:, None]  # [64, M]
            values = grad[:, channels].T * grad_loss
            rep_grad.scatter_add_(0, index.flatten(), values.flatten())
        return rep_grad.view(ctx.shape).to(ctx.dtype), None, None, None
