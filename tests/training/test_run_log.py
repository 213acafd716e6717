"""The CSV of a run."""

from __future__ import annotations

from ltx2_tuner.training.run_log import RunLog, read_log


def write(path, steps, **columns):
    log = RunLog(path)
    for step in steps:
        log.log({"loss/current": step / 8, **columns}, step)


def test_one_row_per_step(tmp_path):
    path = tmp_path / "run.log.csv"
    log = RunLog(path)
    log.log({"loss/current": 0.5, "lr/unet": 1e-4}, 1)
    assert [row["step"] for row in read_log(path)] == [1], "a row is there at once"
    log.log({"loss/current": 0.25, "lr/unet": 1e-4}, 2)
    log.log({"val_loss": 2.0}, 2)
    log.log({"loss/epoch": 0.375}, 2)
    log.log({"loss/current": 0.125, "lr/unet": 1e-4}, 3)
    assert path.read_text(encoding="utf-8").splitlines()[0] == "step,time,loss/current,lr/unet,val_loss,loss/epoch"
    rows = [{name: value for name, value in row.items() if name != "time"} for row in read_log(path)]
    assert rows == [
        {"step": 1, "loss/current": 0.5, "lr/unet": 1e-4},
        {"step": 2, "loss/current": 0.25, "lr/unet": 1e-4, "val_loss": 2.0, "loss/epoch": 0.375},
        {"step": 3, "loss/current": 0.125, "lr/unet": 1e-4},
    ]


def test_a_resumed_run_goes_on_in_the_file(tmp_path):
    path = tmp_path / "run.log.csv"
    write(path, range(1, 8), val_loss=1.0)
    with open(path, "a", encoding="utf-8") as file:
        file.write("8,2026-01-01T0")  # killed while writing
    write(path, range(5, 7), grad=2.0)
    rows = read_log(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "grad" not in rows[3] and "val_loss" not in rows[5] and rows[5]["grad"] == 2.0


def test_a_new_run_starts_afresh(tmp_path):
    path = tmp_path / "run.log.csv"
    write(path, range(1, 8))
    write(path, range(1, 3))
    assert [row["step"] for row in read_log(path)] == [1, 2]


def test_nothing_logged_leaves_no_file(tmp_path):
    RunLog(tmp_path / "run.log.csv")
    assert not list(tmp_path.iterdir())


def test_infinite_numbers_are_kept_as_such(tmp_path):
    path = tmp_path / "run.log.csv"
    log = RunLog(path)
    log.log({"loss/current": float("nan"), "grad_norm/total": float("inf")}, 1)
    (row,) = read_log(path)
    assert row["loss/current"] != row["loss/current"] and row["grad_norm/total"] == float("inf")


def test_a_resumed_run_may_end_the_epoch_of_its_last_step(tmp_path):
    path = tmp_path / "run.log.csv"
    write(path, range(1, 4), grad=1.0)
    RunLog(path).log({"loss/epoch": 0.5}, 3)
    last = {name: value for name, value in read_log(path)[-1].items() if name != "time"}
    assert last == {"step": 3, "loss/current": 3 / 8, "grad": 1.0, "loss/epoch": 0.5}
