"""The toy world: a small generated catalogue and its users, in which the truth is known.

Everything that the four methods claim to find is planted here, so that a claim can be tested against the truth
instead of against a belief. One seed fixes the users and what they do; the catalogue has a seed of its own, so that
different worlds (and the bundled backbone, which has read its descriptions) share the same titles.

THE GENERATIVE MODEL
  item i   genre g_i, theme h_i (both in its categories, and in its description as one of several synonyms),
           popularity log-weight b_i (power law), and a factor c_i in R^4 that no text mentions
  user u   likes 2 genres and 2 themes. One of each pair is kept for life, the other fades out while a third fades in
           (t = 0 is the user's first choice, t = 1 the last): taste drifts. A factor d_u in R^4 goes with c_i.
  taste    sem(u,i,t) = 3 (G + H) + 6 G H        with G = liking of g_i at time t, H = liking of h_i, both in [0, 1]
           col(u,i)   = <d_u, c_i> / 2           visible in behaviour only
           s(u,i,t)   = sem + col
  misled   a share of the users are variety seekers: their semantic part is -0.8 times the overlap of item i with
           their last 10 choices. Whoever reads their history and recommends more of the same is wrong.
  choice   P(next = i | u, t, history) ~ exp(b_i + s(u,i,t)) over the items not chosen yet
  rating   like with probability sigmoid(s - 7): rating 4 or 5, otherwise 1 to 3
  activity log-normal; a share of cold users has only 1 or 2 choices
"""

from dataclasses import dataclass

import numpy as np

# attribute -> the words that reveal it in a description
GENRES = {
    "mystery": ("clues", "a missing letter", "a detective", "an old secret"),
    "romance": ("a first love", "a wedding", "two hearts", "a long kiss"),
    "comedy": ("jokes", "silly mistakes", "a clumsy hero", "loud laughter"),
    "western": ("cowboys", "a dusty saloon", "a sheriff", "wild horses"),
    "horror": ("ghosts", "a haunted cellar", "screams", "a cold shadow"),
    "fantasy": ("wizards", "an enchanted sword", "elves", "a hidden kingdom"),
    "war": ("soldiers", "a long siege", "a brave captain", "trenches"),
    "sport": ("a final match", "a tired coach", "champions", "a lost race"),
}
THEMES = {
    "space": ("starships", "distant moons", "a quiet orbit", "astronauts"),
    "ocean": ("deep waves", "sailors", "a lighthouse", "whales"),
    "music": ("a violin", "an old song", "a choir", "drummers"),
    "food": ("a bakery", "spicy soup", "a head cook", "ripe apples"),
    "robots": ("machines that think", "steel arms", "a kind android", "circuits"),
    "winter": ("deep snow", "a frozen lake", "icicles", "a sledge"),
    "school": ("a strict teacher", "homework", "a class trip", "pupils"),
    "trains": ("a night train", "railways", "a lost ticket", "the last station"),
}
ADJECTIVES = ("Silent Golden Broken Hidden Crimson Distant Gentle Hollow Iron Little "
              "Lonely Lucky Midnight Paper Pale Quiet Rapid Restless Second Secret Seventh "
              "Shining Silver Sleeping Stolen Strange Sudden Tall Velvet Wandering White "
              "Wild Wooden Yellow Ancient Blue Bright Burning Clever Copper").split()
NOUNS = ("Harbor Garden Letter Mirror River Bridge Candle Castle Clock Corner Crown Door Dream Echo Falcon "
         "Feather Field Fire Forest Gate Hill House Island Journey Key Lantern Map Market Mountain Night "
         "Orchard Path Promise Road Rose Shore Sky Stone Storm Street Summer Tower Valley Voice Wall Wheel "
         "Window Winter Witness Year").split()
DESCRIPTIONS = ("A story of {a} and {b}.", "{A}, {b} and a surprising end.",
                "It begins with {b} and ends with {a}.", "With {a}, {b} and a lot of heart.",
                "About {b}, told through {a}.")


@dataclass
class World:
    """The generated world. `data()` is what a recommender may see, everything else is the truth.

    user, item, rating, time: (n,) arrays of the choices in time order; time is in seconds.
    misled, cold: (n_users,) bool. liked: (n_users, 2, 3) genre/theme ids: kept, fading out, fading in.
    """
    titles: list
    categories: list
    texts: list
    genre: np.ndarray        # (n_items,)
    theme: np.ndarray        # (n_items,)
    bias: np.ndarray         # (n_items,) log popularity b_i
    factor_item: np.ndarray  # (n_items, 4) c_i
    factor_user: np.ndarray  # (n_users, 4) d_u
    liked: np.ndarray        # (n_users, 2, 3)
    misled: np.ndarray
    cold: np.ndarray
    user: np.ndarray = None
    item: np.ndarray = None
    rating: np.ndarray = None
    time: np.ndarray = None
    name: str = "toy"

    def taste(self, users, t, recent):
        """s(u, i, t) for every item: (B, n_items). users (B,), t (B,) in [0, 1], recent (B, 10) item ids, -1 =
        none."""
        fade = np.stack([np.ones_like(t), 1 - t, t], axis=1)            # (B, 3) kept, fading out, fading in
        match = []
        for kind, attribute in enumerate((self.genre, self.theme)):
            liking = np.zeros((len(users), 8))
            for j in range(3):
                np.maximum.at(liking, (np.arange(len(users)), self.liked[users, kind, j]), fade[:, j])
            match.append(liking[:, attribute])                          # (B, n_items)
        semantic = 3 * (match[0] + match[1]) + 6 * match[0] * match[1]
        seeker = self.misled[users]
        if seeker.any():                                                # overlap with the last 10 choices
            past, known = recent[seeker], (recent[seeker] >= 0)[:, :, None]
            same = sum(((a[past][:, :, None] == a[None, None, :]) & known).sum(1)
                       for a in (self.genre, self.theme))
            semantic[seeker] = -0.8 * same
        return semantic + self.factor_user[users] @ self.factor_item.T / 2

    def _last_state(self, users, before=None):
        """Each user's last 10 choices (before position `before` in the user's own sequence, default all)."""
        recent = np.full((len(users), 10), -1)
        order = np.argsort(self.user, kind="stable")
        starts = np.searchsorted(self.user[order], np.arange(len(self.cold) + 1))
        for row, u in enumerate(users):
            mine = self.item[order[starts[u]:starts[u + 1]]]
            mine = mine[:len(mine) if before is None else before[row]][-10:]
            recent[row, 10 - len(mine):] = mine
        return recent

    def p_next(self, users, before, length):
        """The Bayes-optimal next-item scores: log P(i | u, t, history) up to a constant, (B, n_items).

        before (B,) is the position in the user's sequence that is to be predicted, length (B,) its length.
        """
        t = np.where(length > 1, before / np.maximum(length - 1, 1), 0.0)
        return self.bias + self.taste(users, t, self._last_state(users, before))

    def order(self, users):
        """Where each item stands in the true order of what users (B,) choose after their training choices, that
        is before the last two: (B, n_items), from 0, the least likely, to 1."""
        length = np.bincount(self.user, minlength=len(self.cold))[users]
        place = self.p_next(users, np.maximum(length - 2, 0), length).argsort(1).argsort(1)
        return place / (place.shape[1] - 1)

    def data(self):
        """What a recommender may see, as common.data.Data."""
        from common.data import Data
        n_users, n_items = len(self.cold), len(self.titles)
        return Data(name=self.name,
                    users=[f"u{u}" for u in range(n_users)], items=[f"i{i}" for i in range(n_items)],
                    titles=self.titles, categories=self.categories, texts=self.texts,
                    user=self.user.astype(np.int32), item=self.item.astype(np.int32),
                    rating=self.rating.astype(np.float32), time=self.time.astype(np.int64), user_fields={},
                    fingerprint=self.name, has_ratings=True, world=self)


def catalogue(n_items, rng):
    """Titles, categories, descriptions and attributes of `n_items` items."""
    pairs = rng.permutation(len(ADJECTIVES) * len(NOUNS))
    titles = []
    for k in range(n_items):
        sequel, pair = divmod(k, len(pairs))
        adjective, noun = ADJECTIVES[pairs[pair] % len(ADJECTIVES)], NOUNS[pairs[pair] // len(ADJECTIVES)]
        titles.append(f"The {adjective} {noun}" + (f" {sequel + 1}" if sequel else ""))
    genre, theme = rng.integers(0, 8, n_items), rng.integers(0, 8, n_items)
    genres, themes = list(GENRES), list(THEMES)
    categories = [[genres[g], themes[h]] for g, h in zip(genre, theme)]
    texts = [describe(c, rng) for c in categories]
    return titles, categories, texts, genre, theme


def describe(categories, rng):
    """One sentence whose words reveal the attributes: describe(["horror", "ocean"]) -> "About sailors, told ..."."""
    genre, theme = categories
    a, b = GENRES[genre][rng.integers(4)], THEMES[theme][rng.integers(4)]
    return DESCRIPTIONS[rng.integers(len(DESCRIPTIONS))].format(a=a, b=b, A=a[0].upper() + a[1:])


def make(n_users=600, n_items=400, n_interactions=15000, misled=0.1, cold=0.08, seed=0, catalogue_seed=0):
    """Generate a world. Shares `misled` and `cold` are of the users. The count of interactions is aimed at: nobody
    but the cold has fewer than 5 or more than an eighth of the items, so that small worlds hold more than was
    asked for.

    Raises ValueError for sizes that leave a user nothing to choose, and where the count is missed by a tenth
    from below.
    """
    if n_users < 2 or n_items < 20 or not 0 <= misled <= 1 or not 0 <= cold < 1:
        raise ValueError("a toy world needs at least 2 users and 20 items, and shares between 0 and 1")
    titles, categories, texts, genre, theme = catalogue(n_items, np.random.default_rng(catalogue_seed))
    rng = np.random.default_rng([seed, 1])
    liked = np.stack([[rng.choice(8, 3, replace=False) for _ in range(2)] for _ in range(n_users)])
    world = World(
        titles, categories, texts, genre, theme, bias=-1.6 * np.log1p(rng.permutation(n_items) / 5.0),
        factor_item=rng.standard_normal((n_items, 4)), factor_user=rng.standard_normal((n_users, 4)),
        liked=liked, misled=rng.random(n_users) < misled, cold=rng.random(n_users) < cold,
        name=f"toy-{n_users}x{n_items}x{n_interactions}-m{misled}-c{cold}-s{seed}-k{catalogue_seed}")

    activity = np.exp(0.35 * rng.standard_normal(n_users))
    warm = ~world.cold
    mean = (n_interactions - 1.5 * world.cold.sum()) / max(activity[warm].sum(), 1e-9)
    length = np.where(world.cold, rng.integers(1, 3, n_users),
                      np.maximum(5, np.round(activity * mean))).astype(int)
    length = np.minimum(length, n_items // 8)          # favourites must not run out
    if length.sum() < 0.9 * n_interactions:
        raise ValueError(f"{n_interactions} interactions are too many for {n_users} users "
                         f"and {n_items} items: about {int(length.sum())} at most")

    # Everybody's k-th choice is drawn at once
    # (Gumbel trick: argmax of score + noise is a draw from the softmax).
    seen = np.zeros((n_users, n_items), dtype=bool)
    recent = np.full((n_users, 10), -1)
    start = rng.integers(0, 5_000_000, n_users)
    rows = []
    for k in range(length.max()):
        active = np.flatnonzero(length > k)
        s = world.taste(active, k / np.maximum(length[active] - 1, 1), recent[active])
        score = world.bias + s + rng.gumbel(size=s.shape)
        score[seen[active]] = -np.inf
        chosen = score.argmax(1)
        liked_it = rng.random(len(active)) < 1 / (1 + np.exp(7 - s[np.arange(len(active)), chosen]))
        rating = np.where(liked_it, rng.integers(4, 6, len(active)), rng.integers(1, 4, len(active)))
        rows.append((active, chosen, rating, start[active] + 86_400 * (k + rng.random(len(active)) * 0.9)))
        seen[active, chosen] = True
        recent[active] = np.concatenate([recent[active, 1:], chosen[:, None]], axis=1)
    user, item, rating, time = (np.concatenate(column) for column in zip(*rows))
    order = np.argsort(time.astype(np.int64), kind="stable")
    world.user, world.item, world.rating = user[order], item[order], rating[order]
    world.time = time.astype(np.int64)[order]
    return world
