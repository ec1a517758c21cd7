"""Whose texts come next: the tenant that was served the fewest tokens lately."""

from __future__ import annotations

from collections import Counter


class Tenants:
    """Virtual token counters (Sheng et al. 2024, arXiv:2401.00588): each tenant's counter rises with the tokens read and
    written for it, the lowest comes next, and who comes back after a while starts no lower than the lowest of those that are
    there. While two tenants both have texts waiting, what each is given differs by at most twice the tokens that are kept at
    once, whatever their texts are.
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._texts: Counter[str] = Counter()

    def enter(self, tenant: str) -> None:
        """A text of a tenant comes."""
        if tenant not in self._texts:
            floor = min((self._served[one] for one in self._texts), default=None)
            # Whoever is not above the floor would be lifted to it: nothing need be known of them.
            self._served = {
                one: served
                for one, served in self._served.items()
                if one in self._texts or (floor is not None and served > floor)
            }
            self._served.setdefault(tenant, floor or 0)
        self._texts[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A text of a tenant is over."""
        self._texts[tenant] -= 1
        if not self._texts[tenant]:
            del self._texts[tenant]

    def serve(self, tenant: str, tokens: int) -> None:
        """So many tokens were read or written for it."""
        self._served[tenant] += tokens

    def served(self, tenant: str) -> int:
        """Its counter."""
        return self._served[tenant]
