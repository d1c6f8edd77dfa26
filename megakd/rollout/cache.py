"""Keys and values of the rollout engine: rows of different lengths side by side, each at its own positions.

Rows are not left-padded. A row's next token is written at the row's own position, and a query sees the positions up to
its own and nothing after them. Columns that pad a prompt on the right therefore need no mask of their own: what they
wrote lies after the row's last real token, and is overwritten before any query of the row gets there.

Legend: B rows of the forward pass, S tokens of a row in the forward pass, L cached positions that are read,
N query heads and G key/value groups of this tensor rank, R = N / G query heads a group, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megakd.batch import to_device


class KVCache:
    """Keys and values of the layers that one rank holds.

    Args:
        layers: number of local layers.
        slots: rows that fit at a time.
        max_length: positions of a row.
        groups: local key/value groups (G).
        head_dim: width of a head (d).
        dtype: of keys and values; that of the model's activations.
        device: where they live.
    """

    def __init__(
        self, layers: int, slots: int, max_length: int, groups: int, head_dim: int, *, dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (layers, slots, groups, max_length, head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 times a stray NaN would be NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def device(self) -> torch.device:
        """Where keys and values live."""
        return self._keys.device

    @property
    def slots(self) -> int:
        """Rows that fit at a time."""
        return self._keys.shape[1]

    @property
    def max_length(self) -> int:
        """Positions of a row."""
        return self._keys.shape[3]

    @property
    def length(self) -> int:
        """Positions that the pass under way reads of a row."""
        return self._length

    @property
    def next_tokens(self) -> bool:
        """Whether the pass under way reads one token in each of the first slots, and no other slot is in use."""
        return self._next_tokens

    def begin(self, slots_B: Tensor, position_ids_BS: Tensor, *, others_free: bool) -> None:
        """Says what the next forward pass writes; called once before it, not once a layer.

        Args:
            slots_B: int64, the cache row of each row of the batch; no slot twice.
            position_ids_BS: int64, consecutive positions in each row. Both are best given on the CPU: they are looked
                at here, and would otherwise cost a wait for the device.
            others_free: no slot but these is in use, so that the pass may have more rows.

        Raises:
            ValueError: a slot or position that the cache does not have.
        """
        rows, columns = position_ids_BS.shape
        self._length = int(position_ids_BS.max()) + 1
        if self._length > self.max_length:
            raise ValueError(f"position {self._length - 1} is outside a cache of max_length {self.max_length}")
        first, last = int(slots_B.min()), int(slots_B.max())
        if first < 0 or last >= self.slots:
            raise ValueError(f"slots {first}..{last} are outside a cache of {self.slots} slots")
        self._slots_B1 = to_device(slots_B, self.device)[:, None]
        self._positions_BS = to_device(position_ids_BS, self.device)
        # Consecutive slots are read as a view; others have to be copied together.
        consecutive = torch.equal(slots_B, torch.arange(first, first + rows, device=slots_B.device))
        self._rows = slice(first, first + rows) if consecutive else self._slots_B1[:, 0]
        # A whole prompt has no past to read: plain causal attention within the batch.
        whole = torch.arange(columns, device=position_ids_BS.device).expand(rows, columns)
        self._from_start = torch.equal(position_ids_BS, whole)
        self._next_tokens = others_free and columns == 1 and not self._from_start and consecutive and first == 0
        self._bias_BSL = None

    def begin_next_tokens(self, position_ids_B1: Tensor, length: int) -> None:
        """`begin` for one token in each of the first slots, no other being in use, without a look at any number: a
        recording of the pass may hold it.

        Args:
            position_ids_B1: int64, where the cache lives; each below `length`.
            length: positions to read, whatever a row has; those after its own are not seen.
        """
        self._length, self._next_tokens, self._from_start = length, True, False
        self._rows = slice(len(position_ids_B1))
        self._slots_B1 = torch.arange(len(position_ids_B1), device=self.device)[:, None]
        self._positions_BS = position_ids_B1
        self._bias_BSL = None

    def attend(self, layer: int, query_SBNd: Tensor, key_SBGd: Tensor, value_SBGd: Tensor) -> Tensor:
        """Stores the new keys and values of a layer, and attends to them and to the row's past.

        Args:
            layer: 0-based local layer number.
            query_SBNd: query head n belongs to group n // R; rotary embedding already applied, as to the keys.
            key_SBGd, value_SBGd: what the batch's tokens add.

        Returns:
            context_SBNd, scaled by d ** -0.5 within the softmax.
        """
        place = (self._slots_B1, slice(None), self._positions_BS)  # advanced indices first: [B, S, G, d]
        self._keys[layer][place] = key_SBGd.transpose(0, 1)
        self._values[layer][place] = value_SBGd.transpose(0, 1)
        query_BNSd = query_SBNd.permute(1, 2, 0, 3)
        if self._from_start:
            key_BGSd, value_BGSd = key_SBGd.permute(1, 2, 0, 3), value_SBGd.permute(1, 2, 0, 3)
            context_BNSd = scaled_dot_product_attention(
                query_BNSd, key_BGSd, value_BGSd, is_causal=True, enable_gqa=True)
            return context_BNSd.permute(2, 0, 1, 3)
        key_BGLd = self._keys[layer][self._rows, :, : self._length]
        value_BGLd = self._values[layer][self._rows, :, : self._length]
        # The R heads of a group ask as if they were R tokens, so that no key or value is repeated.
        batch, heads, columns, width = query_BNSd.shape
        groups = key_BGLd.shape[1]
        query_BGQd = query_BNSd.reshape(batch, groups, heads // groups * columns, width)
        bias_B1QL = self._bias().repeat(1, heads // groups, 1)[:, None]
        context_BGQd = scaled_dot_product_attention(query_BGQd, key_BGLd, value_BGLd, attn_mask=bias_B1QL)
        return context_BGQd.view(batch, heads, columns, width).permute(2, 0, 1, 3)

    def _bias(self) -> Tensor:
        """What is added to a pass' scores [B, S, L]; made by the first layer that attends."""
        if self._bias_BSL is None:
            hidden_BSL = torch.arange(self._length, device=self.device) > self._positions_BS[:, :, None]
            self._bias_BSL = torch.zeros(hidden_BSL.shape, dtype=self._keys.dtype, device=self.device)
            self._bias_BSL.masked_fill_(hidden_BSL, -torch.inf)
        return self._bias_BSL

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of slot `source` to slot `target`, in all layers."""
        self._keys[:, target, :, :length] = self._keys[:, source, :, :length]
        self._values[:, target, :, :length] = self._values[:, source, :, :length]
