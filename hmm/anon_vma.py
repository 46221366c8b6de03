"""`struct anon_vma`: the trees in which the reverse map finds the VMAs that could map a private page.

A VMA whose first private page comes in gets a tree of its own, or its neighbour's.  What fork makes of it is in all
trees that the VMA is in, and in a new one for its own pages; or these go to the tree of an ancestor which uses it no
longer, if only one other tree hangs below that one.  Then relatives are told of the child's pages who can never map
one: those in the ancestor's tree.

**Source**: Linux mm/rmap.c: anon_vma_fork(), anon_vma_clone(), unlink_anon_vmas(), 6.12.

**Invariants**: a VMA's trees are ordered from the oldest; its own is among them.

**Absent**: the VMAs in them (rmap.py), whose number says which family of trees they have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from hmm.units import SpaceId

__all__ = ["AnonVma", "Family", "Forest", "first_family"]

_CHILDREN_MAX = 2
"""Nobody uses the tree of an ancestor again that has as many children."""


class AnonVma(NamedTuple):
    """One tree.

    Attributes:
        space_id, number: of the family that it was made for.
        parent: the same of the tree below which it hangs; (0, 0) of a root.
    """

    space_id: SpaceId
    number: int
    parent: tuple[SpaceId, int] = (0, 0)


class Family(NamedTuple):
    """The trees that some VMAs of one space are in.

    Attributes:
        own: the one that their new pages belong to: vma->anon_vma.
        trees: all, the oldest first: vma->anon_vma_chain.
    """

    own: AnonVma
    trees: tuple[AnonVma, ...]


class Forest:
    """All trees of some relatives, as one fork finds and changes them.

    Args:
        families: one for each VMA that has private pages; looked at when it matters first.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families
        self._active: set[AnonVma] = set()
        self._children: Counter[tuple[SpaceId, int]] = Counter()
        self._is_known = False

    def child(self, parent: Family, space_id: SpaceId, number: int) -> Family:
        """The family of what fork makes of a VMA: in space `space_id`, with that number.

        Cost: O(1) if no ancestor but the oldest lies between, else once O(VMAs of all relatives).
        """
        if len(parent.trees) > 1 and any(tree.parent[0] and tree != parent.own for tree in parent.trees):
            self._look()
            for tree in parent.trees:
                if tree.parent[0] and tree not in self._active and self._children[tree[:2]] < _CHILDREN_MAX:
                    self._active.add(tree)
                    return Family(tree, parent.trees)
        own = AnonVma(space_id, number, parent.own[:2])
        self._children[own.parent] += 1
        return Family(own, (*parent.trees, own))

    def _look(self) -> None:
        if self._is_known:
            return
        self._is_known = True
        trees: set[AnonVma] = set()
        for family in self._families:
            self._active.add(family.own)
            trees.update(family.trees)
        self._children.update(tree.parent for tree in trees)


@lru_cache(maxsize=256)
def first_family(space_id: SpaceId, number: int) -> Family:
    """The family of VMAs that did not come by fork."""
    root = AnonVma(space_id, number)
    return Family(root, (root,))
