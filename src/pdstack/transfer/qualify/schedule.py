"""Which pairs are measured at the same time: rounds in which no place carries two measurements.

A place is whatever must not be shared while it is measured: a host, or a host's NIC where agents have one each. Pairs
are the edges of a graph between places, and a round is one colour of its edges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

Pair = tuple[int, int]


def rounds(prefill: Sequence[str], decode: Sequence[str]) -> list[list[Pair]]:
    """All pairs (prefill agent, decode agent), each once, in rounds without two pairs at one place.

    `prefill` and `decode` hold the place of each agent. Where no place has agents of both roles, there are as few
    rounds as can be: as many as the busiest place has pairs, which is max(P, D) for agents of distinct hosts. Else
    fewer than twice as many; a single host measures one pair at a time.
    """
    pairs = [(p, d) for p in range(len(prefill)) for d in range(len(decode))]
    ends = [(prefill[p], decode[d]) for p, d in pairs]
    colours = _greedy(ends) if set(prefill) & set(decode) else _bipartite(ends)
    found: dict[int, list[Pair]] = defaultdict(list)
    for pair, colour in zip(pairs, colours, strict=True):
        found[colour].append(pair)
    return [found[colour] for colour in sorted(found)]


def _greedy(ends: Sequence[tuple[str, str]]) -> list[int]:
    """The first colour that is free at both ends. Pairs within a host come first: they need the host alone."""
    used: dict[str, set[int]] = defaultdict(set)
    colours = [0] * len(ends)
    for number in sorted(range(len(ends)), key=lambda number: ends[number][0] != ends[number][1]):
        one, other = ends[number]
        colour = next(colour for colour in range(len(ends)) if colour not in used[one] | used[other])
        used[one].add(colour)
        used[other].add(colour)
        colours[number] = colour
    return colours


def _bipartite(ends: Sequence[tuple[str, str]]) -> list[int]:
    """König's theorem: as many colours as the highest degree, by swapping two colours along a path."""
    at: dict[str, dict[int, int]] = defaultdict(dict)  # place -> colour -> edge
    colours = [0] * len(ends)

    def free(place: str) -> int:
        return next(colour for colour in range(len(ends)) if colour not in at[place])

    for number, (one, other) in enumerate(ends):
        mine, theirs = free(one), free(other)
        path = []
        place, colour = other, mine
        while (edge := at[place].get(colour)) is not None:
            path.append(edge)
            place = ends[edge][1] if ends[edge][0] == place else ends[edge][0]
            colour = theirs if colour == mine else mine
        for edge in path:
            for place in ends[edge]:
                del at[place][colours[edge]]
        for edge in path:
            colours[edge] = theirs if colours[edge] == mine else mine
            for place in ends[edge]:
                at[place][colours[edge]] = edge
        # The path never reaches `one`: it comes to that side only by `mine`, which is free there.
        colours[number] = mine
        at[one][mine] = at[other][mine] = number
    return colours
