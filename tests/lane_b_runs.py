"""Records of calibration runs made from measured curves (golden/lane_b_curves.csv)."""

from pathlib import Path

from dev.bench.lane_b_laws import read_curves
from nanochat.config import parse_config
from nanochat.lane_b.curves import Curve
from nanochat.runlog import RunLog
from scripts.lane_b import PROFILES

CSV = Path(__file__).parent / "golden" / "lane_b_curves.csv"
CURVES = read_curves(CSV)  # {(depth, ratio, seed): Curve}
STEP_TOKENS = 2048
STEP_SEC = {2: 0.05, 3: 0.09, 4: 0.16, 5: 0.25, 6: 0.38}
CALIBRATION = [(2, 4, 0), (2, 8, 0), (3, 4, 0)]


def write_record(runs_dir, key, run_id="", curve=None, flags=(), config=None, summary=None,
                 target=None, is_finished=True, changed=(), batch=STEP_TOKENS):
    """Write the record of a run; return its id.

    curve: instead of the measured one. changed: of a resumption. batch: a run of the same tokens.
    """
    depth, ratio, seed = key
    curve: Curve = curve or CURVES[key]
    run_id = run_id or f"d{depth}.r{ratio}.s{seed}"
    horizon, step_sec = curve.horizon * STEP_TOKENS // batch, STEP_SEC[depth] * batch / STEP_TOKENS
    recipe = PROFILES["small"][0].split()
    parsed = parse_config([*recipe, f"--depth={depth}", f"--seed={seed}", *flags])
    log = RunLog.create(runs_dir, run_id, {
        "created_utc": "2026-11-29T10:00:00+00:00", "git_commit": "abc1234", "seed": seed,
        "dataset_id": "books", "tokenizer_id": "bpe", "model_config": {"vocab_size": 2048},
        "n_scaling_params": curve.n_params, "total_batch_size_tokens": batch,
        "num_iterations": horizon, "target_tokens": curve.horizon * STEP_TOKENS,
        "train_tokens": 10**9, "flags": parsed.to_dict(), **(config or {})})
    if changed:
        log.event("resume", step=0, changed=changed)
    for step, loss in zip(curve.steps.tolist(), curve.loss.tolist(), strict=True):
        log.event("val", step=step * STEP_TOKENS // batch, tokens=step * STEP_TOKENS, val_bpb=loss,
                  train_time_sec=step * STEP_SEC[depth])
    if is_finished:
        seconds = curve.horizon * STEP_SEC[depth]
        reached = seconds if target and min(curve.loss) <= target else None
        log.finish(**{"status": "ok", "steps": horizon, "epochs": 0.5,
                      "min_val_bpb": float(min(curve.loss)),
                      "final_val_bpb": float(curve.loss[-1]), "train_time_sec": seconds,
                      "tok_per_sec_median": 4e4, "dt_median_ms": 1e3 * step_sec,
                      "target_metric_name": "val_bpb", "target_metric_threshold": target,
                      "time_to_target_sec_measured": reached, **(summary or {})})
    log.close()
    return run_id
