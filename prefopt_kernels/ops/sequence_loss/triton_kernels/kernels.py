"""The kernels of backend.py.

Rows are computed in fp64 throughout: there are few of them, and only fp64 has exponentials and logarithms that are
right to fp32's last digit on every device. The forms are those of csrc/sequence_loss/sequence_loss.h.
"""

import triton
import triton.language as tl

BCO = tl.constexpr(2)  # METHODS of parameters.py
TVERSKY_KAHNEMAN = tl.constexpr(1)  # 1 + index in WEIGHTINGS
GAMMA = tl.constexpr(0.61)
PRELEC_EXPONENT = tl.constexpr(0.65)
FAR = tl.constexpr(15.0)  # logits above: log(softplus(-a)) by its series
NEAREST = tl.constexpr(-1e-4)  # nats per token; above, log-odds go on along their tangent
TANGENT = tl.constexpr(10000.500008333334)  # -1 / expm1(NEAREST)
# The interpreter multiplies tensors by these only from the right.


@triton.jit
def sum_tokens(logp_ptr, cu_seqlens_ptr, logps_ptr, T, TOKENS: tl.constexpr):
    """Program i: the sum over sequence i, TOKENS sums side by side, in fp64."""
    row = tl.program_id(0)
    begin, end = _bounds(cu_seqlens_ptr, row, T)
    total = tl.zeros((TOKENS,), tl.float64)
    for start in range(begin, end, TOKENS):
        at = start + tl.arange(0, TOKENS)
        total += tl.load(logp_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    tl.store(logps_ptr + row, tl.sum(total, 0).to(tl.float32))


@triton.jit
def spread(dlosses_ptr, dlogps_ptr, cu_seqlens_ptr, slopes_ptr, dlogp_ptr, T, TOKENS: tl.constexpr):
    """Program i: what reaches sequence i, at each of its tokens."""
    row = tl.program_id(0)
    own = 0.0
    if dlosses_ptr is not None:
        own += tl.load(dlosses_ptr + row) * tl.load(slopes_ptr + row)
    if dlogps_ptr is not None:
        own += tl.load(dlogps_ptr + row)
    begin, end = _bounds(cu_seqlens_ptr, row, T)
    for start in range(begin, end, TOKENS):
        at = start + tl.arange(0, TOKENS)
        tl.store(dlogp_ptr + at, tl.zeros((TOKENS,), tl.float32) + own, mask=at < end)


@triton.jit
def _bounds(cu_seqlens_ptr, row, T):
    """First row of a sequence and the one after its last, never outside of [0, T]."""
    begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    return tl.maximum(begin, 0), tl.minimum(end, T)


@triton.jit
def all_rows(
    cu_seqlens_ptr,  # (B + 1,)
    ref_logps_ptr,  # (B,), like all below
    labels_ptr,
    lengths_ptr,  # or None
    logps_ptr,
    losses_ptr,
    log_ratios_ptr,
    rewards_ptr,
    slopes_ptr,
    sums_ptr,  # (8,)
    B,
    reference_point_ptr,  # one number, or None: then the one below
    shift_ptr,
    shift_gate_ptr,
    odds_baseline_ptr,
    decision_mean_ptr,
    reference_point,
    shift,
    shift_gate,
    odds_baseline,
    decision_mean,
    beta,
    shift_bound,
    loss_aversion,
    alpha,
    kappa,
    decision_low,
    decision_high,
    odds_weight,
    desirable_weight,
    undesirable_weight,
    main_bound,
    odds_bound,
    METHOD: tl.constexpr,
    WIN: tl.constexpr,
    DECISION: tl.constexpr,
    OWN_MEAN: tl.constexpr,
    CURVED: tl.constexpr,
    AVERSE: tl.constexpr,
    ODDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Losses, slopes and their sums by class. One program, so that the sums over the rows have one order."""
    one = tl.full((ROWS,), 1.0, tl.float64)
    beta = beta * one
    z = _number(reference_point_ptr, reference_point, one)
    delta = _number(shift_ptr, shift, one)
    gate = _number(shift_gate_ptr, shift_gate, one)
    if METHOD != BCO:
        bounded = tl.where(delta < -shift_bound, -shift_bound, delta)
        bounded = tl.where(bounded > shift_bound, shift_bound, bounded)
        # A closed gate keeps out a shift that is NaN, too.
        z = tl.where(gate > 0, (1.0 - gate) * z + gate * (bounded / beta), z)
    baseline = _number(odds_baseline_ptr, odds_baseline, one)
    mean = _number(decision_mean_ptr, decision_mean, one)
    if DECISION != 0 and OWN_MEAN:
        total, count = one * 0, one * 0
        for start in range(0, B, ROWS):
            at = start + tl.arange(0, ROWS)
            mask = at < B
            m = tl.load(logps_ptr + at, mask=mask, other=-1.0) / _length(cu_seqlens_ptr, lengths_ptr, at, mask)
            omega = _decision_weight(m, decision_low, decision_high, DECISION)
            counts = mask & (omega == omega)  # not NaN
            total += tl.where(counts, omega, 0.0)
            count += tl.where(counts, 1.0, 0.0)
        mean = tl.sum(total, 0) / tl.sum(count, 0)

    zero = one * 0
    n_up, rewards_up, logps_up, losses_up = zero, zero, zero, zero
    n_down, rewards_down, logps_down, losses_down = zero, zero, zero, zero
    for start in range(0, B, ROWS):
        at = start + tl.arange(0, ROWS)
        mask = at < B
        logps = tl.load(logps_ptr + at, mask=mask, other=-1.0).to(tl.float64)
        r = logps - tl.load(ref_logps_ptr + at, mask=mask, other=0.0).to(tl.float64)
        up = tl.load(labels_ptr + at, mask=mask, other=0) != 0
        sign = tl.where(up, one, -one)
        if METHOD == BCO:
            u = sign * (beta * r - delta)
            loss = _softplus(-u)
            slope = -sign * beta * _sigmoid(-u)
        else:
            length = _length(cu_seqlens_ptr, lengths_ptr, at, mask)
            m = logps / length
            u = sign * (beta * (r - z))
            a, rate = u, one
            if CURVED:
                distance = _log1p(tl.abs(u) / kappa)
                size = kappa / (alpha * one) * _expm1(alpha * distance)
                a = tl.where(u >= 0, size, -size)
                rate = tl.exp((alpha - 1.0) * distance)
            loss, win_slope = _missed(a, WIN)
            rate *= win_slope
            if AVERSE:
                even, _even_slope = _missed(zero, WIN)
                loss = tl.where(u >= 0, loss, even + loss_aversion * (loss - even))
                rate = tl.where(u >= 0, rate, loss_aversion * rate)
            weight = tl.where(up, desirable_weight * one, undesirable_weight * one)
            if DECISION != 0:
                weight *= _decision_weight(m, decision_low, decision_high, DECISION) / mean
            loss *= weight
            slope = -sign * _at_most(rate * weight * beta, main_bound)
            if ODDS:
                near = tl.where(m > NEAREST, NEAREST, m)
                rest = -_expm1(near)
                ahead = sign * (near - tl.log(rest) + (m - near) * TANGENT - baseline)
                loss += odds_weight * _softplus(-ahead)
                slope -= sign * _at_most(odds_weight * _sigmoid(-ahead) / rest, odds_bound) / length
        loss = loss.to(tl.float32)
        reward = (beta * r).to(tl.float32)
        tl.store(losses_ptr + at, loss, mask=mask)
        tl.store(slopes_ptr + at, slope.to(tl.float32), mask=mask)
        tl.store(log_ratios_ptr + at, r.to(tl.float32), mask=mask)
        tl.store(rewards_ptr + at, reward, mask=mask)
        down, up = mask & (up == 0), mask & up
        n_up += tl.where(up, 1.0, 0.0)
        rewards_up += tl.where(up, reward, 0.0)
        logps_up += tl.where(up, logps, 0.0)
        losses_up += tl.where(up, loss, 0.0)
        n_down += tl.where(down, 1.0, 0.0)
        rewards_down += tl.where(down, reward, 0.0)
        logps_down += tl.where(down, logps, 0.0)
        losses_down += tl.where(down, loss, 0.0)
    tl.store(sums_ptr, tl.sum(n_up, 0))  # in the order of SUMS of op.py
    tl.store(sums_ptr + 1, tl.sum(rewards_up, 0))
    tl.store(sums_ptr + 2, tl.sum(logps_up, 0))
    tl.store(sums_ptr + 3, tl.sum(losses_up, 0))
    tl.store(sums_ptr + 4, tl.sum(n_down, 0))
    tl.store(sums_ptr + 5, tl.sum(rewards_down, 0))
    tl.store(sums_ptr + 6, tl.sum(logps_down, 0))
    tl.store(sums_ptr + 7, tl.sum(losses_down, 0))


@triton.jit
def _number(pointer, number, one):
    """The number that lies at ``pointer``, or ``number`` where there is none; fp64, of the shape of ``one``."""
    if pointer is not None:
        return tl.load(pointer) * one
    else:
        return number * one


@triton.jit
def _length(cu_seqlens_ptr, lengths_ptr, at, mask):
    """Tokens of each row, at least 1."""
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + at, mask=mask, other=1).to(tl.int64)
    else:
        end = tl.load(cu_seqlens_ptr + at + 1, mask=mask, other=1).to(tl.int64)
        length = end - tl.load(cu_seqlens_ptr + at, mask=mask, other=0).to(tl.int64)
    return tl.maximum(length, 1).to(tl.float64)


@triton.jit
def _at_most(x, bound):
    """A NaN stays one, which tl.minimum does not promise."""
    return tl.where(x > bound, bound, x)


@triton.jit
def _log1p(x):
    """x >= 0. What 1 + x loses to rounding, its logarithm and its difference from 1 lose alike (Kahan)."""
    w = 1.0 + x
    mid = (w != 1.0) & (w < 1e16)
    safe = tl.where(mid, w, 2.0)
    return tl.where(w == 1.0, x, tl.where(mid, tl.log(safe) * (x / (safe - 1.0)), tl.log(w)))


@triton.jit
def _expm1(x):
    """The same idea for exp(x) - 1."""
    w = tl.exp(x)
    mid = (w != 1.0) & (w > 1e-16) & (w < 1e16)
    safe = tl.where(mid, w, 2.0)
    near = (safe - 1.0) * (tl.where(mid, x, 1.0) / tl.log(safe))
    return tl.where(w == 1.0, x, tl.where(mid, near, w - 1.0))


@triton.jit
def _sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def _softplus(x):
    return tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log_add_exp(x, y):
    return tl.where(x > y, x, y) + _log1p(tl.exp(-tl.abs(x - y)))


@triton.jit
def _log_surprise(a):
    """log(-log sigmoid(a)), also where sigmoid(a) rounds to 1."""
    near = tl.log(_softplus(-tl.where(a < FAR, a, FAR)))
    return tl.where(a < FAR, near, -a - tl.exp(-a) / 2.0)


@triton.jit
def _missed(a, WEIGHTING: tl.constexpr):
    """1 - W(sigmoid(a)), and the derivative of W(sigmoid(a)) in a."""
    if WEIGHTING == 0:
        return _sigmoid(-a), _sigmoid(a) * _sigmoid(-a)
    elif WEIGHTING == TVERSKY_KAHNEMAN:
        p = _softplus(-a) * -GAMMA
        log_win = p - _log_add_exp(p, _softplus(a) * -GAMMA) / GAMMA
        slope = tl.exp(log_win) * (_sigmoid(a * -GAMMA) - _sigmoid(-a) * (1.0 - GAMMA))
        return -_expm1(log_win), slope
    else:
        surprise = _log_surprise(a)
        log_win = -tl.exp(surprise * PRELEC_EXPONENT)
        rest = surprise * (PRELEC_EXPONENT - 1.0) - _softplus(a)
        return -_expm1(log_win), tl.exp(log_win + rest) * PRELEC_EXPONENT


@triton.jit
def _decision_weight(mean_logps, low, high, WEIGHTING: tl.constexpr):
    """W(c) / c for c = exp(mean_logps), clipped."""
    m = tl.where(mean_logps > 0, 0.0, mean_logps)
    if WEIGHTING == TVERSKY_KAHNEMAN:
        log_weight = m * GAMMA - _log_add_exp(m * GAMMA, tl.log(-_expm1(m)) * GAMMA) / GAMMA
    else:
        log_weight = -tl.exp(tl.log(-m) * PRELEC_EXPONENT)
    weight = tl.exp(log_weight - m)
    weight = tl.where(weight < low, low, weight)
    return tl.where(weight > high, high, weight)
