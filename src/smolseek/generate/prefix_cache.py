"""Remembers the pages of sequences that have ended, so that a prompt with an equal beginning need not read it again.

The pages are in a tree: the path from the root to a node is the beginning of one or more sequences. There are two kinds
of nodes:

- A *chunk* is a chunk of a prompt, and so are all nodes above it. Its bits are those of every prompt that begins with
  the same tokens, since chunks begin at multiples of the chunk size, whatever is cached.
- A *page* lies below the chunks: it has tokens that a decode step has computed, whose rounding differs from that of a
  prompt, or tokens after them, or the beginning of a chunk that the prompt did not fill.

A prompt may continue after a chunk, and after pages with generated tokens, as in the next turn of a chat. It does not
continue within tokens that were read as a prompt, because the rounding depends on the size of a chunk. So a request has
the same bits with and without the prefix cache, unless its prompt contains generated tokens.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from smolseek.model.paged_cache import PAGE, PagedCache


@dataclass(eq=False)
class Node:
    """Cached tokens that follow those of the parent."""

    tokens: tuple[int, ...]
    """Their ids."""
    pages: list[int]
    parent: "Node | None"
    is_chunk: bool = True
    generated: bool = False
    """Whether some of these tokens, or of those above, were generated."""
    resumable: bool = True
    """Whether a prompt may continue after these tokens."""
    users: int = 0
    """Number of running sequences that begin with these tokens."""
    children: dict[tuple[bool, tuple[int, ...]], "Node"] = field(default_factory=dict)
    """The nodes below, by `is_chunk` and `tokens`."""


class PrefixCache:
    """A tree of cached pages. Each node has a reference to its pages.

    Args:
        cache: the pool of pages.
        chunk: number of tokens of a chunk.
    """

    def __init__(self, cache: PagedCache, chunk: int) -> None:
        self._cache, self._chunk = cache, chunk
        self._root = Node((), [], None)
        # The nodes without users, the least recently used first. A node comes after those below it, since `release`
        # begins with the deepest, so the first one has no children.
        self._unused: OrderedDict[Node, None] = OrderedDict()
        self.unused_pages = 0
        """Number of pages that no running sequence uses; `evict` frees them."""

    def match(self, prompt: tuple[int, ...]) -> list[Node]:
        """Return the longest path after which `prompt` may continue, and acquire it. At least one token is left."""
        most = len(prompt) - 1
        node, path, end = self._root, list[Node](), self._chunk
        while end <= most and (child := node.children.get((True, prompt[end - self._chunk : end]))):
            node, end = child, end + self._chunk
            path.append(child)
        best, longest = path, len(path) * self._chunk
        for depth in range(len(path), -1, -1):
            start = depth * self._chunk
            pages = self._pages_below(path[depth - 1] if depth else self._root, prompt[start:most])
            if start + len(pages) * PAGE > longest:
                best, longest = path[:depth] + pages, start + len(pages) * PAGE
        self._acquire(best)
        return best

    def _pages_below(self, node: Node, tokens: tuple[int, ...]) -> list[Node]:
        """Return the longest path of pages below `node` that begins `tokens`, up to a resumable one."""
        path, resumable = list[Node](), 0
        for end in range(PAGE, len(tokens) + 1, PAGE):
            child = node.children.get((False, tokens[end - PAGE : end]))
            if child is None:
                break
            node = child
            path.append(node)
            resumable = len(path) if node.resumable else resumable
        return path[:resumable]

    def insert_chunk(self, path: list[Node], tokens: tuple[int, ...], pages: Sequence[int]) -> list[int]:
        """Append tokens of a prompt that were read together to an acquired path, if all nodes are chunks then.

        Return the pages of the tokens. If the tree has this chunk already, these are other pages with the same bits.
        """
        if len(tokens) < self._chunk or (path and not path[-1].is_chunk):
            return list(pages)
        path.append(self._insert(path, Node(tokens, list(pages), None)))
        return path[-1].pages

    def insert_pages(self, path: list[Node], ids: Sequence[int], pages: Sequence[int], prompt_tokens: int) -> None:
        """Append the remaining full pages of a sequence that ends to its acquired path.

        Args:
            path: the nodes with which the sequence begins.
            ids: the cached tokens of the sequence, of which the first `prompt_tokens` are its prompt.
            pages: the pages of the sequence.
            prompt_tokens: number of tokens of the prompt.
        """
        start = sum(len(node.tokens) for node in path)
        for end in range(start + PAGE, len(ids) + 1, PAGE):
            new = end > prompt_tokens
            generated = new or (bool(path) and path[-1].generated)
            resumable = new or (generated and end % self._chunk == 0)
            page = pages[end // PAGE - 1]
            path.append(
                self._insert(path, Node(tuple(ids[end - PAGE : end]), [page], None, False, generated, resumable))
            )

    def _insert(self, path: Sequence[Node], node: Node) -> Node:
        """Put a node below a path, acquire it and return it, or a node with the same tokens that is there already."""
        node.parent = path[-1] if path else self._root
        inserted = node.parent.children.setdefault((node.is_chunk, node.tokens), node)
        if inserted is node:
            self._cache.share(node.pages)
            node.users = 1
        else:
            self._acquire([inserted])
        return inserted

    def _acquire(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if not node.users:
                del self._unused[node]
                self.unused_pages -= len(node.pages)
            node.users += 1

    def release(self, path: Sequence[Node]) -> None:
        """End the use of an acquired path, whose nodes become the most recently used."""
        for node in reversed(path):
            node.users -= 1
            if not node.users:
                self._unused[node] = None
                self.unused_pages += len(node.pages)

    def evict(self, free: int) -> None:
        """Remove the least recently used nodes until the pool has `free` free pages."""
        while self._cache.free < free:
            node, _ = self._unused.popitem(last=False)
            assert not node.children and node.parent is not None
            del node.parent.children[(node.is_chunk, node.tokens)]
            self.unused_pages -= len(node.pages)
            self._cache.release(node.pages)
