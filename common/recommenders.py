"""Click models on ids and categories. DIN: Deep Interest Network (arXiv 1706.06978).

Item ids are shifted by one in here: 0 is padding.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cuda import Dropout


class AttentionUnit(nn.Module):
    """DIN's activation unit: how much each past item matters for each candidate.

    weight(q, k) = w2 . relu(W1 [q; k; q - k; q * k] + b1) + b2, without softmax (the paper keeps the intensity).
    W1 is applied in its parts, W1 [q; k; q-k; q*k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k), so that the wide
    concatenation for every (candidate, past item) pair is never built.
    """

    def __init__(self, dim, hidden=32):
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.first = nn.Linear(4 * dim, hidden)
        self.second = nn.Linear(hidden, 1)

    def parts(self, q, k):
        """W1's parts for q (..., D) and k (..., D): Wq + Wd applied, with the bias, Wk - Wd applied, and Wp
        itself."""
        wq, wk, wd, wp = self.first.weight.split(self.dim, dim=1)              # each (H, D)
        return q @ (wq + wd).T + self.first.bias, k @ (wk - wd).T, wp

    def weights(self, q, k):
        """q (B, C, D) candidates, k (B, L, D) past items -> (B, C, L)."""
        of_q, of_k, wp = self.parts(q, k)                                      # (B, C, H), (B, L, H)
        B, L, D = k.shape
        # few candidates: they take Wp, not the past
        if q.shape[1] < self.hidden:
            both = k[:, None] @ (q[:, :, None] * wp).transpose(2, 3)           # (B, C, L, H)
            return (both.add_(of_q[:, :, None]).add_(of_k[:, None]).relu_() @ self.second.weight[0]
                    + self.second.bias)
        # product part as one matrix product
        keys = (k[:, :, None, :] * wp).reshape(B, L * self.hidden, D)
        if torch.is_grad_enabled():
            both = (q @ keys.transpose(1, 2)).view(B, q.shape[1], L, self.hidden)
            return F.relu(both + of_q[:, :, None] + of_k[:, None]) @ self.second.weight[0] + self.second.bias
        # Serving: the same in blocks that stay in the cache, in place. Memory traffic is what costs here.
        out, size = q.new_empty(B, q.shape[1], L), max(1, 2**18 // (L * self.hidden))
        for b in range(B):
            bias = of_k[b].reshape(-1)
            for s in range(0, q.shape[1], size):
                block = torch.addmm(bias, q[b, s:s + size], keys[b].T).view(-1, L, self.hidden)
                out[b, s:s + size] = block.add_(of_q[b, s:s + size, None]).relu_() @ self.second.weight[0]
        return out + self.second.bias

    def forward(self, q, k, mask):
        """Weighted sum of the past for each candidate: mask (B, L), 1 = keep -> (B, C, D). Few candidates
        ask of the past only what is there: on a CPU padding costs as much as items do."""
        if q.shape[1] >= self.hidden:
            return (self.weights(q, k) * mask[:, None]) @ k
        place = mask.flatten().nonzero()[:, 0]
        row, k = place // k.shape[1], k.flatten(0, 1).index_select(0, place)   # (N,), (N, D)
        of_q, of_k, wp = self.parts(q, k)                                      # (B, C, H), (N, H)
        both = (q.index_select(0, row) * k[:, None]) @ wp.T                    # (N, C, H)
        weights = (both.add_(of_q.index_select(0, row)).add_(of_k[:, None]).relu_() @ self.second.weight[0]
                   + self.second.bias)
        return torch.zeros_like(q).index_add_(0, row, weights[..., None] * k[:, None])


# --------------------------------------------------------------------------------------- CTR models on fields
def look(table, index):
    """Rows of an nn.Embedding, (..., D) for index (...). Its gradient, an index_add, takes a CPU a third of the
    time of F.embedding's, but the row of padding has one, too: mask what is padded."""
    return table.weight.index_select(0, index.flatten()).view(*index.shape, -1)


def mean_of(table, index):
    """index (..., K), 0 = nothing -> the mean of the rows that are there, (..., D); zeros where none is."""
    there = (index > 0).to(table.weight.dtype)
    return ((there / there.sum(-1, keepdim=True).clamp(min=1))[..., None, :] @ look(table, index))[..., 0, :]


class FM(nn.Module):
    """Factorisation machine of order 2 (DeepFM, arXiv 1703.04247): sum over pairs of fields of <e_i, e_j>."""

    def forward(self, e):
        """e (B, F, D) -> (B,), by (sum e)^2 - sum e^2 instead of the pairs."""
        return ((e.sum(1) ** 2 - (e ** 2).sum(1)) / 2).sum(-1)


class CIN(nn.Module):
    """Compressed interaction network (xDeepFM, arXiv 1803.05170, eq. 6) of two layers, x^0 = e:
    x^k_h = sum_ij W^k_hij x^(k-1)_i * e_j, each summed over D. There is no activation: the paper found none to do
    best. So the sum over D may come first, of products of two and of three fields, and takes D times less work.
    """

    def __init__(self, fields, first, second):
        super().__init__()
        self.first = nn.Linear(fields * fields, first, bias=False)
        self.second = nn.Linear(first * fields, second, bias=False)

    def forward(self, e):
        """e (B, F, D) -> (B, first + second)."""
        pairs = (e[:, :, None] * e[:, None]).flatten(1, 2)                      # (B, F F, D)
        x1, x1_e = self.first(pairs.sum(-1)), self.first.weight @ (pairs @ e.transpose(1, 2))   # (B, first, F)
        return torch.cat([x1, self.second(x1_e.flatten(1))], -1)


class InteractingLayer(nn.Module):
    """Self-attention over fields (AutoInt, arXiv 1810.11921, eq. 5-8): heads side by side, residual, relu; the
    scores are not scaled, as published."""

    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.skip = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, e):
        """e (B, F, D) -> (B, F, D)."""
        split = lambda x: x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, F, D / heads)
        q, k, v = (split(f(e)) for f in (self.query, self.key, self.value))
        mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return F.relu(mixed.transpose(1, 2).flatten(2) + self.skip(e))


class CrossNet(nn.Module):
    """DCN (arXiv 1708.05123): x_l+1 = x_0 <x_l, w> + b + x_l. DCNv2 (arXiv 2008.13535): x_l+1 = x_0 * (W x_l +
    b) + x_l."""

    def __init__(self, width, layers, matrix):
        super().__init__()
        self.weight = nn.ModuleList(nn.Linear(width, width if matrix else 1, bias=matrix)
                                    for _ in range(layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(0 if matrix else layers))

    def forward(self, x0):
        """x0 (B, W) -> (B, W)."""
        x = x0
        for k, weight in enumerate(self.weight):
            x = x0 * weight(x) + x + (self.bias[k] if len(self.bias) else 0)
        return x


class CTR(nn.Module):
    """Click model: logit = first order (deepfm, xdeepfm, autoint) + crossing + MLP, on fields of D numbers:
    user, item, the past items, and where items have categories these of the item and of the past (5 fields,
    else 3).

    kind: deepfm, xdeepfm, autoint, dcn, dcnv2, din. They differ in the crossing and the first order, and DIN in the
    past: it weighs past items by the candidate, all others take their mean. categories (n_items + 1, K): those of
    each shifted item, 0 = none; an item has their mean. extra: width of further inputs of the MLP (KAR's vectors).
    """

    def __init__(self, kind, n_users, n_items, categories, dim=64, hidden=(200, 80), dropout=0.1, extra=0):
        super().__init__()
        self.register_buffer("categories", torch.as_tensor(categories).long())
        n_categories = int(self.categories.max()) + 1
        self.kind, self.kinds = kind, 2 if n_categories > 1 else 1      # of an item: its id, its categories
        n_fields = 1 + 2 * self.kinds
        width = n_fields * dim
        self.user, self.item = nn.Embedding(n_users, dim), nn.Embedding(n_items + 1, dim)
        self.category = nn.Embedding(n_categories, dim) if self.kinds == 2 else None
        self.first_order = nn.ModuleList(
            nn.Embedding(n, 1) for n in (n_users, n_items + 1, n_categories)[:1 + self.kinds]
            if kind in ("deepfm", "xdeepfm", "autoint"))
        for table in filter(None, (self.user, self.item, self.category)):
            nn.init.normal_(table.weight, std=0.01)
        for table in self.first_order:
            nn.init.zeros_(table.weight)
        self.unit = AttentionUnit(self.kinds * dim) if kind == "din" else None
        self.fm = FM() if kind == "deepfm" else None
        self.cross = (CIN(n_fields, 100, 100) if kind == "xdeepfm" else
                      InteractingLayer(dim) if kind == "autoint" else
                      CrossNet(width, 3, False) if kind == "dcn" else
                      CrossNet(width, 2, True) if kind == "dcnv2" else None)
        crossed = 0 if self.cross is None else 200 if kind == "xdeepfm" else width
        sizes = [width + extra, *hidden]
        self.mlp = nn.Sequential(*[
            layer for a, b in zip(sizes, sizes[1:])
            for layer in (nn.Linear(a, b), nn.ReLU(inplace=True), Dropout(dropout))])
        self.out = nn.Linear(hidden[-1] + crossed, 1)

    def fields(self, users, items, history, state=None):
        """(B, C, F, D). state (B, D) takes the place of the user's embedding. The past is read once for all
        candidates of a row; DIN weighs it once for each."""
        (B, C), D = items.shape, self.item.embedding_dim
        mine = self.of_items(items)                                             # (B, C, kinds D)
        if self.unit is not None:
            pooled = self.unit(mine, self.of_items(history), (history > 0).to(mine.dtype))
        else:
            pooled = mean_of(self.item, history)
            if self.category is not None:
                pooled = torch.cat([pooled, mean_of(self.category, self.categories[history].flatten(1))], -1)
            pooled = pooled[:, None].expand_as(mine)
        user = (look(self.user, users) if state is None else state)[:, None].expand(B, C, D)
        return torch.cat([user, mine, pooled], -1).view(B, C, -1, D)

    def of_items(self, items):
        """(B, N) shifted ids -> (B, N, kinds D): the item, and its categories where there are any."""
        e = look(self.item, items)
        return (e if self.category is None
                else torch.cat([e, mean_of(self.category, self.categories[items])], -1))

    def forward(self, users, items, history, extra=None, state=None):
        """users (B,), items (B, C) shifted by one, history (B, L) shifted, 0 = padding, extra (B, C, E), state
        (B, D) in place of the user's embedding -> logits (B, C)."""
        e = self.fields(users, items, history, state).flatten(0, 1)             # (B C, F, D)
        flat = e.flatten(1)
        parts = [self.mlp(flat if extra is None else torch.cat([flat, extra.flatten(0, 1)], -1))]
        if self.cross is not None:
            parts.append(self.cross(flat if self.kind.startswith("dcn") else e).flatten(1))
        logit = self.out(torch.cat(parts, -1)).view(items.shape)
        if self.fm is not None:
            logit = logit + self.fm(e).view(items.shape)
        if self.first_order:
            of_user, of_item, *of_category = self.first_order
            logit = logit + look(of_user, users) + look(of_item, items)[..., 0]
            for table in of_category:
                logit = logit + mean_of(table, self.categories[items])[..., 0]
        return logit

    @torch.no_grad()
    def score_catalogue(self, users, history, chunk=512):
        """Logits of every item (B, n_items), column i = item id i (without the shift)."""
        every = torch.arange(1, self.item.num_embeddings, device=history.device)
        return torch.cat([self(users, part.expand(len(users), -1), history)
                          for part in every.split(chunk)], 1)
