"""Page pool under any order of events: held, counted and found pages."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lm.decoding.engine.pages import PagePool

N, P, CHUNK = 8, 2, 2  # pages, tokens of a page, pages of a chunk
TEXT = st.builds(lambda first, n: (first, *range(n)), st.integers(0, 1), st.integers(0, 9))


class Pool(RuleBasedStateMachine):
    """Rows that use a pool as the engine does, and what each page holds in truth."""

    def __init__(self):
        super().__init__()
        self.pool, self.rows, self.truth = PagePool(N, P), [], {}

    def find(self, text, root, exact):
        found = self.pool.find(text, root, exact, CHUNK if exact else 1)
        assert len(found) * P < len(text)
        assert len(found) % (CHUNK if exact else 1) == 0
        for i, page in enumerate(found, 1):
            *content, is_exact = self.truth[page]
            assert content == [root, text[: i * P]]
            assert is_exact or not exact
        return found

    @rule(text=TEXT, root=st.sampled_from(["", "adapter"]), exact=st.booleans())
    def admit(self, text, root, exact):
        found = self.find(text, root, exact)
        self.pool.hold(found)
        n_more = -(-len(text) // P) - len(found)
        if n_more > self.pool.n_available:
            self.pool.release(found)
            return
        taken = self.pool.take(n_more)
        held = [page for row in self.rows for page in row["pages"]]
        assert len(set(taken)) == n_more
        assert not {*taken} & {*held, *found}
        self.truth |= dict.fromkeys(taken)
        n = len(found)
        self.rows.append(
            {"text": text, "root": root, "pages": [*found, *taken], "n": n, "exact": n * exact}
        )

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), by=st.integers(1, 2 * CHUNK), exact=st.booleans())
    def write(self, data, by, exact):
        """Write further pages of a row, and say so; pages are exact up to the first that is not."""
        row = data.draw(st.sampled_from(self.rows))
        first, end = row["n"], min(row["n"] + by, len(row["text"]) // P)
        if exact and row["exact"] == first:
            row["exact"] = end
        for i in range(first, end):
            content = row["root"], row["text"][: (i + 1) * P], i < row["exact"]
            self.truth[row["pages"][i]] = content
        row["n"] = end
        tokens = row["text"][: end * P]
        self.pool.store(tokens, row["root"], row["pages"], row["exact"], first)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), exact=st.booleans())
    def find_again(self, data, exact):
        """Let a row that has written nothing use what others have written since."""
        row = data.draw(st.sampled_from(self.rows))
        found = self.find(row["text"], row["root"], exact)
        if row["n"] == 0 and found:
            self.pool.hold(found)
            self.pool.release(row["pages"][: len(found)])
            row["pages"][: len(found)] = found
            row["n"], row["exact"] = len(found), len(found) * exact

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data):
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        self.pool.release(row["pages"])

    @rule()
    def clear(self):
        while self.rows:
            self.pool.release(self.rows.pop()["pages"])
        self.pool.clear()
        self.truth = {}

    @invariant()
    def counts_are_those_of_the_rows(self):
        held = {page for row in self.rows for page in row["pages"]}
        assert (self.pool.n_held, self.pool.n_available) == (len(held), N - len(held))

    def teardown(self):
        for row in self.rows:
            self.pool.release(row["pages"])
        assert sorted(self.pool.take(N)) == list(range(N))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25)


def test_stored_pages_are_found():
    """By requests with a seed only where the pages are exact, whole chunks of them."""
    pool, text = PagePool(N, P), tuple(range(9))
    pages = pool.take(4)
    pool.store(text[:8], "", pages, n_exact=3)
    pool.release(pages)
    assert pool.find(text, "", exact=False) == pages
    assert pool.find(text, "", exact=True) == pages[:3]
    assert pool.find(text, "", exact=True, multiple=2) == pages[:2]
    assert pool.find(text[:8], "", exact=False) == pages[:3]  # a token is left
    assert pool.find(text, "adapter", exact=False) == []
    assert pool.take(N - 3)[-1] == pages[3]  # later pages of a text are dropped first
    assert pool.find(text, "", exact=False) == pages[:3]


def test_pages_that_are_held_again_are_not_taken():
    pool, texts = PagePool(N, P), [tuple(range(i, i + N)) for i in (0, 1)]
    rows = [pool.take(N // 2) for _ in texts]
    for text, pages in zip(texts, rows, strict=True):
        pool.store(text, "", pages, n_exact=N // 2)
        pool.release(pages)
    pool.hold(rows[0])  # the least recently used ones
    assert sorted(pool.take(N // 2)) == sorted(rows[1])


def test_cleared_pages_are_not_found():
    pool, text = PagePool(N, P), tuple(range(9))
    pages = pool.take(4)
    pool.store(text, "", pages, n_exact=4)
    pool.release(pages)
    pool.clear()
    assert pool.find(text, "", exact=False) == []
    assert sorted(pool.take(N)) == list(range(N))
