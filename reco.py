"""The regional contrast loss, ReCo (Liu, Zhi, Johns, Davison, "Bootstrapping Semantic Segmentation with Regional
Contrast", ICLR 2022, arXiv 2104.04465): hard pixels of a class (active queries) are pulled to the class
mean (prototype) and pushed from pixels of the classes most like it (active negative keys).

What is drawn. Marginally every query and every set of N keys has the paper's law, so loss and gradient have the
paper's expectation. Two liberties are taken with what is drawn *together*, one for speed, one against variance:
- the queries of a class share its N negative keys, so the logits of a class are one [Q, D] x [D, 1 + N] product;
- the queries of a class are Q evenly spaced picks with a random offset from its hard pixels, not Q separate draws.
The N keys of a query stay independent draws: spreading them evenly too would change the mean loss, since the log of a
sum is concave (by +0.09 of 3.99 at temperature 0.1 with N 16). `sampling="independent"` takes neither liberty.

Several processes. The loss is that of the whole batch: prototypes, classes present, relation graph and negative keys
come from the pixels of all processes; queries are local, and weighted so that the mean over processes (of the loss,
and of the gradient, which DDP averages) is in expectation what one process with the whole batch would get. Every
process makes the same three collectives whatever its labels hold, so none waits for another. Payload at 19 classes,
D 256, N 512, float32: sums and counts 20 kB, uniforms 78 kB, keys 19*512*256*4 = 10.0 MB.

Cost, at rep 4x256x128x128, 19 classes, Q 256, N 512, float32. Memory: rep is read once for the prototypes (67 MB),
C*(Q+N) = 14,592 vectors are gathered (15 MB; each number lies on a cache line of its own, so 0.24 GB travel), the
gradient is filled once (67 MB). Arithmetic: prototypes 2*n*C*D = 0.64 GFLOP, logits and their gradient
2 * 2*C*Q*(N+1)*D = 2.55 GFLOP. Predicted from timing those parts alone on 2 CPU cores: 90 ms forward and backward.
Measured there, otherwise idle: medians of 66 to 88 ms, the authors' implementation in the same script 14.9 to 16.8 s
(169 to 239 times); 72 MB above the inputs and their gradient, against 3.2 GB. sampling="independent": 2.4 s.
For a GPU (not measured): no shape and no branch depends on a tensor's values, so the host never waits for the device.
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
    """The ReCo loss of a batch (the paper's pixel-level contrast, with active hard sampling of queries and keys).

    rep    [B, D, h, w] float32, bfloat16 or float16: representations, the only input that gets a gradient.
    label  [B, h, w] int64: class of each pixel; a label outside 0 .. C-1 (255, -1) is not valid.
    prob   [B, C, h, w] float: softmax probabilities; a pixel is hard if that of its own class is below strong_threshold
           (above 1: every pixel is, which gives the paper's random queries).
    valid  [B, h, w] bool: pixels that take part.
    sampling      "stratified" (module docstring) or "independent" (the paper's plain draws, slower, one process only).
    active_keys   False: negative classes uniformly among the others present, not by their relation (ablation).
    return_stats  also return a dict of tensors: num_classes [] classes present and num_hard [C] hard pixels, both over
                  all processes; queries [C, Q] index into the B*h*w pixels of this process; query_weight [C], 0 where
                  the class contributes nothing here; relation [C, C] probability of each negative class (row: query
                  class), 0 for an absent one.

    Returns a float32 scalar: 0, with zero gradient, where fewer than two classes are present. With torch.distributed
    initialised all processes must call it; the value is this process's share, whose mean over processes is the loss.
    Randomness is the global generator of rep's device. Raises ValueError on shapes, types or options that do not fit.
    """
    check_inputs(rep, label, prob, valid, temperature, num_queries, num_negatives, sampling)
    B, D, h, w = rep.shape
    C, Q, N, n, device = prob.shape[1], num_queries, num_negatives, B * h * w, rep.device
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if several and sampling == "independent":
        raise ValueError(
            'sampling="independent" runs in one process only: its keys are too many to exchange'
        )

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        # ---- Pixels by class, by one stable sort: [hard of 0 | easy of 0 | hard of 1 | ... | not valid].
        # Every set of pixels used below is then a stretch of `order`: no masks, whose sizes the host would wait for.
        valid = valid & (label >= 0) & (label < C)
        label = label.clamp(0, C - 1)  # safe to index with
        easy = prob.gather(1, label[:, None])[:, 0].float() >= strong_threshold  # [B, h, w]
        segment = torch.where(valid, 2 * label + easy, 2 * C).flatten().int()  # [n]
        segment, order = segment.sort(stable=True)
        edge = torch.searchsorted(
            segment, torch.arange(2 * C + 1, dtype=torch.int32, device=device)
        )
        start, hard_end = edge[:-1:2], edge[1::2]  # [C] into order
        num_valid, num_hard = edge[::2].diff(), hard_end - start  # [C] of this process

        # ---- Prototypes: the mean representation of a class over all its valid pixels: the positive key.
        rows = rearrange(rep.float(), "b d h w -> b (h w) d")  # a view if rep is float32
        one_hot = (
            valid[:, None] & (label[:, None] == torch.arange(C, device=device).view(C, 1, 1))
        ).flatten(2)
        class_sum = torch.bmm(one_hot.float(), rows).sum(0)  # [C, D]
        counts = torch.zeros(world, 2, C, device=device)  # float32: exact up to 16.7 million
        counts[rank] = torch.stack([num_valid, num_hard])
        if several:
            shared = torch.cat([class_sum.flatten(), counts.flatten()])
            dist.all_reduce(shared)
            class_sum, counts = shared[: C * D].view(C, D), shared[C * D :].view(world, 2, C)
        all_valid, all_hard = counts.long().sum(0)  # [C] over all processes
        owned_from = counts[:rank, 0].sum(0).long()  # [C] valid pixels of earlier processes
        prototype = F.normalize(
            class_sum / all_valid.clamp(min=1)[:, None], dim=1, eps=EPS
        )  # only cosines are taken

        # ---- Class relation graph: how alike two prototypes are; row c says where the negative keys of c come from.
        present = all_valid > 0
        num_classes = present.sum()  # |V|
        relation = class_relation(
            prototype, present, temperature if active_keys else float("inf")
        )  # [C, C]

        # ---- Active queries: hard pixels of each class, with replacement.
        if sampling == "stratified":
            u = (torch.arange(Q, device=device) + torch.rand(C, 1, device=device)) / Q
        else:
            u = torch.rand(C, Q, device=device)
        pick = (u * num_hard[:, None]).long().minimum(num_hard[:, None] - 1).clamp(min=0)
        queries = order[(start[:, None] + pick).clamp(max=n - 1)]  # [C, Q] pixels
        # A process holding a share of the hard pixels of a class speaks for that share (world: the mean divides by it).
        query_weight = world * num_hard / all_hard.clamp(min=1) * (num_classes > 1)

        # ---- Contrast, in groups of queries that share their keys: all of a class, or (independent) each one alone.
        groups, block = (
            (C, C) if sampling == "stratified" else (C * Q, 32)
        )  # blocks bound the memory
        rows = (
            rows if sampling == "stratified" else rows.contiguous()
        )  # far more gathers than pixels: copy once
        all_queries = take(rows, queries).view(groups, -1, D)  # [G, Q or 1, D]
        group_class = torch.arange(groups, device=device) // (groups // C)  # [G]
        loss, grad = [], []
        for c, query in zip(
            group_class.split(block), all_queries.split(block)
        ):  # c: [g] class of each group
            # Active keys: first a class by its relation to c, then one of its valid pixels, N times.
            u = torch.rand(2, len(c), N, device=device)
            if several:
                dist.broadcast(u, src=0)  # all processes mean the same keys
            edges = relation.cumsum(1)[c]  # [g, C]
            key_class = torch.searchsorted(edges, u[0] * edges[:, -1:], right=True).clamp(
                max=C - 1
            )  # [g, N]
            pick = (u[1] * all_valid[key_class]).long().minimum(
                all_valid[key_class] - 1
            ) - owned_from[key_class]
            negative = take(rows, order[(start[key_class] + pick).clamp(0, n - 1)])  # [g, N, D]
            if several:  # the owner of a pixel fills it in
                owned = (pick >= 0) & (pick < num_valid[key_class])
                negative = torch.where(owned[..., None], negative, 0)
                dist.all_reduce(negative)
            keys = torch.cat(
                [prototype[c, None], F.normalize(negative, dim=2, eps=EPS)], dim=1
            )  # [g, 1 + N, D]
            block_loss, block_grad = contrast(query, keys, temperature)
            loss.append(block_loss)
            grad.append(block_grad)
        loss, grad = torch.cat(loss).view(C, Q), torch.cat(grad).view(C, Q, D)

        # ---- The loss: mean over the queries of a class, then over the classes present, hard pixels or not.
        weight = query_weight / num_classes.clamp(min=1)  # [C]
        loss = torch.where(weight > 0, weight * loss.mean(1), 0).sum()
        grad = torch.where(
            weight[:, None, None] > 0, grad * (weight / Q)[:, None, None], 0
        )  # [C, Q, D]

    loss = WithGradient.apply(rep, loss, queries.flatten(), grad.flatten(0, 1))
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
    """Raise ValueError, in one line, on inputs of reco_loss that do not fit (reads no tensor values)."""
    if rep.dim() != 4 or rep.numel() == 0 or not rep.is_floating_point():
        raise ValueError(
            f"rep must be a non-empty float tensor [B, D, h, w], got {rep.dtype} {list(rep.shape)}"
        )
    B, _, h, w = rep.shape
    if prob.dim() != 4 or prob.shape[:1] + prob.shape[2:] != (B, h, w):
        raise ValueError(f"prob must be [B, C, h, w] = [{B}, C, {h}, {w}], got {list(prob.shape)}")
    if label.shape != (B, h, w) or label.dtype != torch.int64:
        raise ValueError(
            f"label must be int64 [{B}, {h}, {w}], got {label.dtype} {list(label.shape)}"
        )
    if valid.shape != (B, h, w) or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be bool [{B}, {h}, {w}], got {valid.dtype} {list(valid.shape)}"
        )
    if temperature <= 0 or num_queries < 1 or num_negatives < 1:
        raise ValueError(
            "temperature must be positive, num_queries and num_negatives at least 1, got "
            f"{temperature}, {num_queries}, {num_negatives}"
        )
    if sampling not in ("stratified", "independent"):
        raise ValueError(f'sampling must be "stratified" or "independent", got {sampling!r}')


def class_relation(prototype, present, temperature):
    """Class relation graph (active key sampling): softmax of the prototypes' cosine / temperature over the others present.

    prototype [C, D] float32 unit vectors, present [C] bool -> [C, C] float32, rows and columns of absent classes 0.
    """
    other = (
        present[:, None]
        & present
        & ~torch.eye(len(present), dtype=torch.bool, device=present.device)
    )
    score = (prototype @ prototype.T / temperature).masked_fill(
        ~other, torch.finfo(torch.float32).min
    )
    return score.softmax(1) * other


def contrast(query, keys, temperature):
    """Cross-entropy of each query against its keys, the first being the positive one (the ReCo loss), and its gradient.

    query [g, q, D] float32; keys [g, 1 + N, D] float32 unit vectors -> loss [g, q], d loss / d query [g, q, D].
    With z the unit query, p the softmax of z.keys / temperature and e the one-hot of the positive key,
    dloss/dz = (p - e) keys / temperature; what points along z only changes the query's length and is taken out.
    """
    length = query.norm(dim=2, keepdim=True)
    z = query / length.clamp(min=EPS)
    log_p = (torch.bmm(z, keys.mT) / temperature).log_softmax(2)  # [g, q, 1 + N]
    loss = -log_p[..., 0]
    p = log_p.exp()
    p[..., 0] -= 1
    grad = torch.bmm(p, keys) / temperature  # [g, q, D]
    grad = (grad - (grad * z).sum(2, keepdim=True) * z) / length.clamp(min=EPS)
    return loss, torch.where(length > EPS, grad, 0)


def take(rows, pixel):
    """The vectors of the given pixels: rows [B, h*w, D] (any strides), pixel [...] index into B*h*w -> [..., D]."""
    return rows[pixel // rows.shape[1], pixel % rows.shape[1]]


class WithGradient(torch.autograd.Function):
    """loss [], whose gradient with respect to rep [B, D, h, w] is grad [M, D] added up at pixel [M]; zero elsewhere."""

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
        # Into a flat buffer, channel by channel as it lies in memory: a pixel drawn more than once adds up, in float32
        # and on a CPU in a fixed order (scatter_add_ in one dimension is serial there).
        first = pixel // (h * w) * (D * h * w) + pixel % (h * w)  # [M] channel 0 of each pixel
        index = first + h * w * torch.arange(D, device=pixel.device)[:, None]  # [D, M]
        rep_grad = grad.new_zeros(B * D * h * w).scatter_add_(
            0, index.flatten(), (grad.T * grad_loss).flatten()
        )
        return rep_grad.view(ctx.shape).to(ctx.dtype), None, None, None
