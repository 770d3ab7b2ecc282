"""Published benchmarks of infrared small targets: their data, our runs, and the table and figure of docs/benchmarks.md."""
