from tests.attacks import table


def test_the_page_has_what_is_tried() -> None:
    assert f"{table.BEGIN}\n{table.table()}\n{table.END}" in table.PAGE.read_text(), "python -m tests.attacks.table"
