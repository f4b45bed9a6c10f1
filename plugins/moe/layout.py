"""How INT4 codes lie in the words that the MoE kernels read: a permutation of K inside groups of 64.

Words are int32 [E, N, K/8]: for each expert and output column N the K codes follow each other, four bits each, lowest
bits first. Slot s of a group of ``GROUP`` codes holds code ``K_ORDER[s]`` of that group.

A kernel takes nibbles j and j + 4 of a word at once (one shift, one mask, one exclusive or make two 16-bit numbers in
one register). Tensor cores want neighbours of K in such a pair. So word i of the eight in a group holds, at nibbles j
and j + 4, codes 16 j + 2 i and 16 j + 2 i + 1: step j over all eight words gives the 16 codes that follow code 16 j, in
order and under one scale for every block size.
"""

from __future__ import annotations

#: Codes that are permuted among themselves. K is a multiple of it.
GROUP = 64
#: Slot 8 i + j (word i, nibble j) holds code ``16 * (j % 4) + 2 * i + j // 4``.
K_ORDER = tuple(16 * (slot % 4) + 2 * (slot // 8) + slot % 8 // 4 for slot in range(GROUP))
