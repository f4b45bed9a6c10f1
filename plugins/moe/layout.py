"""How INT4 codes lie in the words that the MoE kernels read: a permutation of K inside small groups.

Words are int32 [E, N, K/8]: for each expert and output column N the K codes follow each other, four bits each, lowest
bits first. Slot s of a group of ``GROUP`` codes holds code ``K_ORDER[s]`` of that group.
"""

from __future__ import annotations

#: Codes that are permuted among themselves. K is a multiple of it.
GROUP = 64
#: Slots 2j and 2j+1 (one byte) hold codes j and 32+j: the low nibbles of 32 bytes are one run of K, the high ones the next.
K_ORDER = tuple(slot // 2 + 32 * (slot % 2) for slot in range(GROUP))
