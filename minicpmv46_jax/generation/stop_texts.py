"""Stop texts of one output, compiled to an automaton (Aho and Corasick, 1975).

The cost of a character does not depend on the number of stop texts. Compilation takes time proportional to
their length, so it runs with the validation of a request's options.
"""

from collections import deque
from collections.abc import Iterable


class StopTexts(tuple[str, ...]):
    """Stop texts, none of them empty, with the automaton that finds them.

    State s of the automaton is a node of the trie of all texts; the root is 0. The state after some output is
    its longest suffix that begins a stop text.
    """

    depth: list[int]  # characters on the path to each node
    match: list[int]  # length of the longest stop text that ends each node's path; 0 if none does
    _children: list[dict[str, int]]
    _fallback: list[int]  # node of the longest proper suffix of each node's path

    def __new__(cls, texts: Iterable[str] = ()):
        """Compiles the texts."""
        self = super().__new__(cls, texts)
        self.depth, self.match, self._children, self._fallback = [0], [0], [{}], [0]
        for text in self:
            self._insert(text)
        self._link()
        return self

    def step(self, state: int, character: str) -> int:
        """Returns the state after one more character."""
        children = self._children
        while state and character not in children[state]:
            state = self._fallback[state]
        return children[state].get(character, 0)

    def _insert(self, text: str) -> None:
        node = 0
        for character in text:
            child = self._children[node].setdefault(character, len(self.depth))
            if child == len(self.depth):
                self.depth.append(self.depth[node] + 1)
                self.match.append(0)
                self._children.append({})
                self._fallback.append(0)
            node = child
        self.match[node] = len(text)

    def _link(self) -> None:
        """Sets the fallback of each node, breadth first, and the matches that end inside longer texts."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            self.match[node] = self.match[node] or self.match[self._fallback[node]]
            for character, child in self._children[node].items():
                self._fallback[child] = self.step(self._fallback[node], character)
                queue.append(child)
