"""The bugs of kernel_mutants.py: where each is, and the text that makes it."""

LOAD = 'mask=there, other=float("-inf")).to(tl.float32)\n\n'
INSIDE = "there = column < columns\n    place = LOGITS"
OTHERS = "tl.where(tl.arange(0, TILE) == likeliest, 0.0, e)"
LINE = "        tl.store(place, tl.zeros"
PRODUCT = "tile_statistics(_logits(x, part.t(), softcap),"
BASE = 'tl.where(top == float("-inf"), 0.0, top)'
LIMIT = "token[None, :] < limit[:, None]"
STEPS = "tl.cdiv(longest, tl.num_programs(2))"
WEIGHT = 'tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))'
HIDDEN = "torch.arange(tokens, device=limit.device) >= limit"
MUTANTS = {  # name: (file, text to replace, with what)
    # In the Triton kernels over logits.
    "phantom columns count as logits of 0": ("tiles.py", LOAD, LOAD.replace("-inf", "0")),
    "the maximum starts at 0": (
        "tiles.py", "base = tl.where(top ==", "top = tl.maximum(top, 0.0); base = tl.where(top =="),
    "0 times minus infinity": (
        "tiles.py", "tl.maximum(x, NEGLIGIBLE, propagate_nan=tl.PropagateNan.ALL)", "x"),
    "a tile of minus infinity has a nan for a base": ("tiles.py", BASE, "top"),
    "statistics ignore the temperature": (
        "tiles.py", "(tl.load(INVERSE_T + row) * LOG2_E)", "LOG2_E"),
    "the gradient is not divided by the temperature": (
        "tiles.py", "+ tilt) * inverse_t", "+ tilt)"),
    "the gradient's entropy term has the wrong sign": ("tiles.py", "+ tilt)", "- tilt)"),
    "the gradient's entropy term forgets the entropy": (
        "tiles.py", "(log_p + tl.load(ENTROPY + out_row))", "log_p"),
    "the last column is left out": (
        "tiles.py", INSIDE, INSIDE.replace("columns\n", "columns - 1\n")),
    "the target of the next tile": (
        "tiles.py", "own // TILE == tile", "own // TILE == tile + (own % TILE == 0)"),
    "the target's gradient is that of any other column": (
        "tiles.py", "dz = tl.where(column + first == target", "dz = tl.where(column + first == -1"),
    "ignored rows are read": (
        "tiles.py", "if target == IGNORE:\n" + LINE, "if target == IGNORE - 1:\n" + LINE),
    "gradients go by the number of the kept row": (
        "tiles.py", "tl.load(ROWS + out_row)", "out_row"),
    "ties count once": ("tiles.py", OTHERS, "tl.where(x == 0.0, 0.0, e)"),
    "the sum keeps the likeliest token": (
        "tiles.py", f"tl.sum({OTHERS}, axis=0)", "tl.sum(e, axis=0) - 1.0"),
    "s in bits": ("tiles.py", "tl.sum(e * x, axis=0) / LOG2_E", "tl.sum(e * x, axis=0)"),
    "the logarithm is left out": ("tiles.py", "if h != 0.0:", "if h == 123.0:"),
    # In the Triton kernel that finds the largest logits.
    "a column is taken twice": (
        "tiles.py", 'rank = tl.where(column == best, float("-inf"), rank)', "rank = rank"),
    "phantom columns are among the largest": (
        "tiles.py", 'rank = tl.where(there, rank, float("-inf"))', "rank = rank"),
    "nan is not among the largest": (
        "tiles.py", 'tl.where(z == z, tl.clamp(z, -HIGHEST, HIGHEST), float("inf"))',
        "tl.where(z == z, tl.clamp(z, -HIGHEST, HIGHEST), -HIGHEST)"),
    "a column of minus infinity is one that is not there": (
        "tiles.py", "tl.clamp(z, -HIGHEST, HIGHEST)", "z"),
    "the largest of later slices count from 0": ("head.py", "columns + first", "columns"),
    "the largest are sorted, their tokens are not": (
        "head.py", ".gather(1, order)", "[:, : order.shape[1]]"),
    # Around them.
    "entropy from unshifted logits": (
        "tile_math.py", "entropy = log_sum - weighted / (1 + rest)",
        "z = top * inverse_t; entropy = (z + log_sum) - (z + weighted / (1 + rest))"),
    "log p from z - lse": (
        "tile_math.py", "logprob = (whole.at_target - top) * inverse_t - log_sum",
        "logprob = whole.at_target * inverse_t - (top * inverse_t + log_sum)"),
    "tiles are added up without their factors": (
        "tile_math.py", "factor = offset.exp()", "factor = torch.ones_like(offset)"),
    "tiles are added up with the likeliest": (
        "tile_math.py", "torch.where(likeliest, 0.0, factor).sum(dim=1) + (likeliest.sum(dim=1)",
        "factor.sum(dim=1) + (0 * likeliest.sum(dim=1)"),
    "log of 1 + r": ("tile_math.py", "rest.log1p()", "(1 + rest).log()"),
    "1 - p of a sure token": ("tile_math.py", "-g * logprob.expm1()", "g * (1 - logprob.exp())"),
    "log of a rounded p": (
        "tile_math.py", "log_().clamp_(min=NEGLIGIBLE).add_(shift)",
        "mul_(shift.exp()).log_().clamp_(min=NEGLIGIBLE)"),
    "the slope of the cap is left out": (
        "slices.py", "dz.mul_(1 - (z / softcap).square())", "dz"),
    "the log-sum-exp is not divided by the temperature": (
        "tile_math.py", "top * inverse_t + log_sum", "top + log_sum"),
    "the gradient of the log-sum-exp leaves out the target": (
        "tile_math.py", "at_target += of_lse * logprob.exp()", "pass"),
    "the gradient of the log-sum-exp has the wrong sign": (
        "tile_math.py", "g - of_lse", "g + of_lse"),
    "tokens with a slope of the log-sum-exp alone are dropped": (
        "head.py", " | (of_lse != 0)", ""),
    "logits rounded to bf16": ("slices.py", PRODUCT, PRODUCT[:-1] + ".bfloat16().float(),"),
    "the weight's gradient is summed in bf16": (
        "slices.py", "weight.dtype if parts <= 1 else wide(weight)", "weight.dtype"),
    "the weight's gradient of a recomputed head is summed in bf16": (
        "head.py", "sum_of(weight, len(parts))", "sum_of(weight, 1)"),
    "the next group of slices begins where this one did": ("slices.py", "first = place", "pass"),
    "a slice's place within its group is forgotten": (
        "slices.py", "place += part.shape[1]", "place += 0"),
    "exponentials kept in bf16": ("slices.py", "torch.float16 if half", "torch.bfloat16 if half"),
    "padding of the vocabulary counts": ("one_pass.py", "weight[:vocab_size]", "weight"),
    "rows with an entropy slope alone are dropped": (
        "one_pass.py", "(g != 0) | (h != 0)", "g != 0"),
    "targets of the second slice count from 0": ("slices.py", "y, i * SLICE, t", "y, 0, t"),
    "the temperature of another token": (
        "one_pass.py", "inverse_t[rows]", "inverse_t[: len(rows)]"),
    "the mean is over all rows": (
        "reference.py", "mask.sum() if count is None", "mask.numel() if count is None"),
    "the mask does not weight": (
        "reference.py", "weighted = losses * mask\n", "weighted = losses * (mask != 0)\n"),
    # In the Triton kernels of branches.
    "branches see a token too many": ("branch_parts.py", LIMIT, LIMIT.replace("<", "<=")),
    "the last visible token is not read": (
        "branch_parts.py", "read = token < longest", "read = token < longest - 1"),
    "memory beyond the limit is read": (
        "branch_parts.py", "read = token < longest", "read = token < longest + 1"),
    "scores are not scaled": ("branch_parts.py", " * SCALE", ""),
    "queries of the next key": (
        "branch_parts.py", "kv_head * REP + row % SPAN", "kv_head + row % SPAN"),
    "all trunks begin at 0": ("branch_parts.py", "if START is not None:", "if False:"),
    "values keep old weights": ("branch_parts.py", "out = out * factor[:, None]", "out = out"),
    "the sum keeps old weights": ("branch_parts.py", "total * factor + tl", "total + tl"),
    "a branch without a token has a nan for a base": (
        "branch_parts.py", 'tl.where(new_top == float("-inf"), 0.0, new_top)', "new_top"),
    "a step belongs to two pieces": (
        "branch_parts.py", "minimum(first + size, long", "minimum(first + size + 1, long"),
    "the last piece ends early": ("branch_parts.py", STEPS, "longest // tl.num_programs(2)"),
    "pieces are merged without their weights": (
        "branch_parts.py", WEIGHT, 'tl.where(lse > float("-inf"), 1.0, 0.0)'),
    "own pieces overwrite the trunk's": ("branch_parts.py", "+ first_piece + tl", "+ tl"),
    # In PyTorch's attention of branches.
    "PyTorch, a token too many": ("branch_tiles.py", HIDDEN, HIDDEN.replace(">=", ">")),
    "PyTorch, a trunk token too many": (
        "branch_tiles.py", "_bias_beyond(limits,", "_bias_beyond(limits + 1,"),
    "PyTorch, memory beyond the limit is read": (
        "branch_attention.py", "if out.sum().isnan():", "if False:"),
    "PyTorch, an empty own cache has weight exp(0)": (
        "branch_attention.py", "return out, lse.masked_fill", "return out, lse; lse.masked_fill"),
    "PyTorch, trunk and own cache swap weights": (
        "branch_attention.py", "second[1] - lse)", "lse - second[1])"),
    "PyTorch, branches in the order of their trunks": (
        "branch_attention.py", "out.index_select(0, groups.back)", "out[:n]"),
    "PyTorch, all trunks are the first": ("branch_tiles.py", " or start[run[0]] != trunk)", ")"),
}  # fmt: skip
AT_THE_EDGES = {  # which a few checks of kernel_edges.py are there for
    "lengths are those of the first call": (
        "branch_attention.py", "start, fork, length = seen.values()",
        "start, fork, length = seen.__dict__.setdefault('old', seen.values())"),
    "a full tile may begin before the trunk": ("branch_parts.py", "(begin >= 0) & ", ""),
    "no tokens are no piece": (
        "branch_parts.py", "_parts(q, own_k,", "own_k.shape[1] and _parts(q, own_k,"),
    "counts are looked at once": ("refuse.py", "if look:  # changed", "if False:  # changed"),
    "a fork may end anywhere": ("refuse.py", " & (start + fork <= tokens)", ""),
    "a length may be above the room": ("refuse.py", " & (length <= capacity)", ""),
    "a tile may have two starts": (
        "refuse.py", "~reads | (start[slot] == common)", "~reads | True"),
    "tiles are looked at once": (
        "refuse.py", "(*seen.values(), tuple(seen.tiles.table.flatten().tolist()))",
        "seen.values()"),
    "a tile may hold slots that are not there": ("refuse.py", " & (count[n] == 0)", ""),
    "a tile may hold any slot": (
        "refuse.py", "(count[:n] == 1) & (count[n] == 0)", "count[:n] > -1"),
    "tiles may be of more branches": ("refuse.py", "if seen.tiles.branches != n:", "if False:"),
    "any head dim": ("branch_parts.py", "    require_head_dim(size)\n", ""),
    "values lie as keys do": ("branch_parts.py", "* v_token_stride", "* k_token_stride"),
    "heads of values lie as those of keys": (
        "branch_parts.py", "* v_head_stride", "* k_head_stride"),
    "slots of values lie as those of keys": (
        "branch_parts.py", "* v_slot_stride", "* k_slot_stride"),
    "queries lie side by side": ("branch_parts.py", "head * q_head_stride", "head * D"),
    "limits beyond the memory": (
        "branch_parts.py", "(limit >= 0) & (limit <= tokens)", "(limit >= 0)"),
    "trunks beyond the memory": ("branch_parts.py", " & (limit <= tokens - begin)", ""),
    "launched on the current device": (
        "tiles.py", "if x.is_cuda else nullcontext()", "if False else nullcontext()"),
    "a GPU's blocks of no rows": (
        "logits.py", "max(1, n if logits.is_cuda else", "(n if logits.is_cuda else"),
    "the upstream gradient is rounded": (
        "one_pass.py", "grad.item()", "grad.bfloat16().item()"),
    "gradients under no_grad": (
        "one_pass.py", "chunk, torch.is_grad_enabled())", "chunk, True)"),
    "parameters of the loss": ("one_pass.py", "  _require_nothing_else(loss", "  (loss"),
    "a loss that is a number": ("one_pass.py", "not isinstance(loss, Tensor) or loss", "loss"),
    "fp16 in one pass": ("refuse.py", "x.dtype == torch.float16", "False"),
    "products are added term by term": (
        "reference.py", "out.add_(a.to(out.dtype) @ b.to(out.dtype))",
        "out.addmm_(a.to(out.dtype), b.to(out.dtype))"),
    "a setting of the process": (
        "reference.py", "return a.to(wide(a)) @", "torch.backends.mkldnn.matmul.fp32_precision = "
        "'bf16' if a.dtype == torch.bfloat16 else 'none'; return a.to(wide(a)) @"),
    "rows are counted in the dtype of the mask": (
        "reference.py", "mask.to(losses.dtype)  # first", "mask  # first"),
    "a product under autocast": (
        "reference.py", "with plain_dtypes(a):\n        return", "if True:\n        return"),
    "a sum of products under autocast": (
        "reference.py", "with plain_dtypes(a):\n            out.add_",
        "if True:\n            out.add_"),
    "a loss may overwrite log p": (
        "one_pass.py", "_slopes(token_loss, statistics, rows, enabled)",
        "_slopes(token_loss, statistics, rows, enabled); logprobs[rows] = statistics.logprob"),
    "any number of likeliest tokens": ("head.py", "if k < 0:", "if False:"),
    "counts of another device": ("refuse.py", '"start": seen.start, "tiles', '"tiles'),
    "tiles of another device": ("refuse.py", ', "tiles.table": seen.tiles.table', ""),
    "ignored rows are counted": ("reference.py", ", mask.masked_fill(ignored, 0)", ", mask"),
    "an ignored row has a temperature": (
        "refuse.py", '< float("inf"))) | ignored', '< float("inf")))'),
    "no forward derivative": ("refuse.py", "if any(forward_ad", "if False and any(forward_ad"),
    "chunk of nothing": ("refuse.py", "chunk is not None and chunk < 1", "False"),
    "devices but two": (
        "slices.py", 'CHUNK.get(hidden.device.type, CHUNK["cpu"])', "CHUNK[hidden.device.type]"),
}  # fmt: skip
MUTANTS |= AT_THE_EDGES
CONTROLS = {  # not broken: were they killed, the death of a mutant would mean nothing
    "unchanged Triton kernels": ("tiles.py", BASE, BASE),
    "unchanged PyTorch": ("slices.py", PRODUCT, PRODUCT),
    "unchanged Triton kernels of branches": ("branch_parts.py", LIMIT, LIMIT),
    "unchanged PyTorch of branches": ("branch_tiles.py", HIDDEN, HIDDEN),
}
KINDS = {"tiles.py": "triton", "branch_parts.py": "triton"}
