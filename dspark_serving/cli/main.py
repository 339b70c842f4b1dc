"""The `dspark` command."""

from __future__ import annotations

import typer

from dspark_serving.cli.assets import assets_app
from dspark_serving.cli.bench import bench
from dspark_serving.cli.bundle import bundle_app
from dspark_serving.cli.calibrate import calibrate
from dspark_serving.cli.data import data_app
from dspark_serving.cli.demo import demo
from dspark_serving.cli.evaluate import evaluate
from dspark_serving.cli.inspect import inspect
from dspark_serving.cli.replay import replay
from dspark_serving.cli.train import train, train_demo

app = typer.Typer(no_args_is_help=True, help="DSpark drafters on SGLang.", pretty_exceptions_enable=False)
app.add_typer(assets_app, name="assets")
app.add_typer(bundle_app, name="bundle")
app.add_typer(data_app, name="data")
app.command()(bench)
app.command()(calibrate)
app.command()(demo)
app.command()(evaluate)
app.command()(inspect)
app.command()(replay)
app.command()(train)
app.command()(train_demo)

if __name__ == "__main__":  # torchrun -m dspark_serving.cli.main
    app()
