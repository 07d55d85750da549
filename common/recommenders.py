"""Recommenders on ids. DIN: Deep Interest Network (arXiv 1706.06978).

Item ids are shifted by one in here: 0 is padding.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


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

    def weights(self, q, k):
        """q (B, C, D) candidates, k (B, L, D) past items -> (B, C, L)."""
        wq, wk, wd, wp = self.first.weight.split(self.dim, dim=1)              # each (H, D)
        of_q = q @ (wq + wd).T + self.first.bias                               # (B, C, H)
        of_k = k @ (wk - wd).T                                                 # (B, L, H)
        B, L, D = k.shape
        keys = (k[:, :, None, :] * wp).reshape(B, L * self.hidden, D)          # product part as one matrix product
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
        """Weighted sum of the past for each candidate: mask (B, L) or (B, C, L), 1 = keep -> (B, C, D)."""
        mask = mask[:, None] if mask.dim() == 2 else mask
        return (self.weights(q, k) * mask) @ k


class DIN(nn.Module):
    """DIN on ids: logit of MLP[e_u; e_i; sum_j weight(e_i, e_j) e_j]."""

    def __init__(self, n_users, n_items, dim=32, hidden=(64, 32), unit=32):
        super().__init__()
        self.user = nn.Embedding(n_users, dim)
        self.item = nn.Embedding(n_items + 1, dim, padding_idx=0)
        self.unit = AttentionUnit(dim, unit)
        sizes = [3 * dim, *hidden]
        self.mlp = nn.Sequential(*[layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())],
                                 nn.Linear(sizes[-1], 1))

    def forward(self, users, items, history):
        """users (B,), items (B, C), history (B, L) with 0 = padding -> logits (B, C)."""
        e, past = self.item(items), self.item(history)
        pooled = self.unit(e, past, (history > 0).to(e.dtype))
        return self.mlp(torch.cat([self.user(users)[:, None].expand_as(e), e, pooled], -1)).squeeze(-1)

    @torch.no_grad()
    def score_catalogue(self, users, history, chunk=512):
        """Logits of every item (B, n_items), column i = item id i (without the shift)."""
        every = torch.arange(1, self.item.num_embeddings, device=history.device)
        return torch.cat([self(users, part.expand(len(users), -1), history) for part in every.split(chunk)], 1)
