"""Interactions as sequences: who chose what in which order, what may be learned from, and two rankers that need no
training to compare with."""

import numpy as np
import torch

from common import metrics
from common.prompts import item_line
from common.run import UserError


def category_table(names):
    """names: a list of names per item -> (n_items + 1, K) int64: their numbers at the item's shifted id, 0 = none."""
    number = {name: k for k, name in enumerate(sorted({name for of_item in names for name in of_item}), 1)}
    table = np.zeros((len(names) + 1, max(1, *map(len, names))), dtype=np.int64)
    for i, of_item in enumerate(names, 1):
        table[i, :len(of_item)] = [number[name] for name in of_item]
    return table


class Logs:
    """The interactions as the phases read them: per user a sequence in time order, the last two held out.

    sequence[u]: item ids, oldest first. n_train[u]: how many of them may be learned from; position n_train[u] is the
    validation target and n_train[u] + 1 the test target (users with fewer than 3 interactions have neither).
    """

    def __init__(self, data, history):
        self.data, self.history_length = data, history
        self.lines = [item_line(t, c) for t, c in zip(data.titles, data.categories)]
        order = np.argsort(data.user, kind="stable")            # the data are sorted by time already
        self.bounds = np.searchsorted(data.user[order], np.arange(len(data.users) + 1))
        self.items, self.times = data.item[order], data.time[order]
        self._train_keys = None
        self.on_device = None                                   # items and bounds, where they were last read
        length = np.diff(self.bounds)
        self.n_train = np.where(length >= 3, length - 2, length)
        self.held_out = np.flatnonzero(length >= 3)             # users with a validation and test target

    def sequence(self, u):
        return self.items[self.bounds[u]:self.bounds[u + 1]]

    def item_at(self, users, positions):
        return self.items[self.bounds[users] + positions]

    def history(self, u, before):
        """The last titles of user u before position `before`, as prompt lines: nothing at or after it is read."""
        return [self.lines[i] for i in self.sequence(u)[max(0, before - self.history_length):before]]

    def had(self, users, before):
        """(B, n_items) bool: what each of users (B,) chose before position `before` (B,)."""
        mask = np.zeros((len(users), len(self.data.items)), dtype=bool)
        for row, (u, end) in enumerate(zip(users, before)):
            mask[row, self.sequence(u)[:end]] = True
        return mask

    def targets(self, name):
        """Choices to be predicted from at least one earlier one: (users, positions) of train, valid and test.
        UserError, naming the data, where a user's four choices are missing."""
        if not len(self.held_out) or self.n_train.max() < 2:
            raise UserError(f"--data {name}: no user has the 4 choices "
                            "that training, validation and test need")
        many, last = np.maximum(self.n_train - 1, 0), self.n_train[self.held_out]
        users, positions = (np.repeat(np.arange(len(many)), many),
                            np.concatenate([np.arange(1, k + 1) for k in many]))
        return (users, positions), (self.held_out, last), (self.held_out, last + 1)

    def train_events(self):
        """(users, positions) of all training interactions in time order, ties by user: stable and total."""
        users = np.repeat(np.arange(len(self.n_train)), self.n_train)
        positions = np.concatenate([np.arange(n) for n in self.n_train])
        order = np.lexsort((positions, users, self.times[self.bounds[users] + positions]))
        return users[order], positions[order]

    def train_keys(self):
        """What each user had in training, sorted keys user * n_items + item: what negatives to train with must
        spare."""
        if self._train_keys is None:                            # asked for in every epoch that draws anew
            users, positions = self.train_events()
            self._train_keys = np.unique(users.astype(np.int64) * len(self.data.items)
                                         + self.item_at(users, positions))
        return self._train_keys

    def item_counts(self):
        """How often each item was chosen in training, (n_items,) int64: its popularity."""
        users, positions = self.train_events()
        return np.bincount(self.item_at(users, positions), minlength=len(self.data.items))

    def histories(self, users, before, length, after=None):
        """(B, length) item ids + 1: the items of each user before position `before` (and from `after` on), at most
        `length` of them, oldest first, padded with 0 at the end. Arrays, or tensors, on whose device it then
        happens."""
        users, before = torch.as_tensor(users), torch.as_tensor(before)
        if self.on_device is None or self.on_device[0].device != users.device:
            self.on_device = [torch.as_tensor(x.astype(np.int64), device=users.device)
                              for x in (self.items, self.bounds)]
        items, bounds = self.on_device
        first = ((before - length).clamp(min=0) if after is None
                 else torch.maximum(before - length, torch.as_tensor(after)))
        index = first[:, None] + torch.arange(length, device=users.device)
        flat = (bounds[users][:, None] + index).clamp(max=len(items) - 1)
        return torch.where(index < before[:, None], items[flat] + 1, 0)

    def windows(self, length, size, rng):
        """Cut every training sequence into windows of at most `length`, at cuts that move, and group windows of like
        length into batches of `size` -> list of (users, starts, ends), shuffled."""
        users, cuts = [], []
        for u in np.flatnonzero(self.n_train > 0):
            n = self.n_train[u]
            first = int(rng.integers(0, length)) if n > length else 0
            cut = np.arange(first - length if first else 0, n, length)
            users.append(np.full(len(cut), u))
            cuts.append(cut)
        users, cuts = np.concatenate(users), np.concatenate(cuts)
        starts, ends = np.maximum(cuts, 0), np.minimum(cuts + length, self.n_train[users])
        order = np.lexsort((rng.random(len(users)), (ends - starts) // 4))    # nearly sorted, ties at random
        batches = [(users[k], starts[k], ends[k])
                   for k in np.array_split(order, max(1, round(len(order) / size)))]
        return [batches[k] for k in rng.permutation(len(batches))]


def popularity(logs):
    """The baseline that knows nobody: items by how often they were chosen in training."""
    count = logs.item_counts().astype(float)
    ranks = []
    for u in logs.held_out[:, None]:            # one by one: users times items may not fit into memory
        end = logs.n_train[u] + 1
        ranks.append(metrics.ranks_of(count[None], logs.item_at(u, end), logs.had(u, end))[0])
    return metrics.ranking_report(np.array(ranks))


def bayes(logs):
    """The toy world's own next-item law as a ranker: nothing can do better on average."""
    world, users = logs.data.world, logs.held_out
    raw = np.array([int(logs.data.users[u][1:]) for u in users])
    length = np.diff(logs.bounds)[users]
    scores = world.p_next(raw, length - 1, length)[:, [int(i[1:]) for i in logs.data.items]]
    return metrics.ranking_report(
        metrics.ranks_of(scores, logs.item_at(users, length - 1), logs.had(users, length - 1)))
