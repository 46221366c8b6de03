"""The trees of VMAs with private pages: which one a child's pages belong to."""

from __future__ import annotations

from hmm.anon_vma import AnonVma, Family, Forest, first_family


def generations(count: int) -> list[Family]:
    """The families of a VMA and of its child, grandchild and so on, in spaces 1, 2 and so on."""
    families = [first_family(1, 1)]
    for space_id in range(2, count + 1):
        families.append(Forest(families).child(families[-1], space_id, 1))
    return families


def test_child_is_in_all_trees_of_its_parent_and_one_of_its_own() -> None:
    """anon_vma_fork() attaches the VMA to what its parent is attached to, then adds an anon_vma."""
    *_, parent, child = generations(3)
    assert child.own == AnonVma(3, 1, (2, 1))
    assert child.trees == (*parent.trees, child.own)
    assert child.trees[0] == AnonVma(1, 1)


def test_child_takes_the_tree_of_an_ancestor_that_has_ended() -> None:
    """anon_vma_clone() uses an anon_vma again that has no VMA and one child, so that no chain grows for ever."""
    root, middle, parent = generations(3)
    child = Forest([root, parent]).child(parent, 4, 1)
    assert child == Family(middle.own, parent.trees)


def test_child_gets_a_tree_of_its_own_when_the_ancestor_uses_its_own() -> None:
    """anon_vma->num_active_vmas is not 0."""
    families = generations(3)
    assert Forest(families).child(families[-1], 4, 1).own == AnonVma(4, 1, (3, 1))


def test_child_gets_a_tree_of_its_own_when_two_hang_below_the_ancestors() -> None:
    """anon_vma->num_children is 2: the walk could look through the whole hierarchy otherwise."""
    root, middle, parent = generations(3)
    sibling = Forest([root, middle, parent]).child(middle, 5, 1)
    assert Forest([root, parent, sibling]).child(parent, 4, 1).own.space_id == 4
    assert Forest([root, parent]).child(parent, 4, 1).own.space_id == 2, "the sibling has ended"


def test_child_leaves_the_oldest_tree_alone_when_nobody_uses_it() -> None:
    """The root has itself as a child, and so never less than two."""
    _, parent = generations(2)
    assert Forest([parent]).child(parent, 3, 1).own.space_id == 3


def test_second_vma_gets_a_tree_of_its_own_when_the_first_took_the_ancestors() -> None:
    """Both halves of a VMA that was cut have the same trees; fork comes to the lower one first."""
    root, middle, parent = generations(3)
    forest = Forest([root, parent, parent])
    assert [forest.child(parent, 4, number).own.space_id for number in (1, 2)] == [middle.own.space_id, 4]
