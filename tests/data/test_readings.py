"""What a cache remembers of its entries survives a line that was cut short."""

from dataclasses import fields, replace

from emoe_med.data.readings import KnownReadings, Reading


def reading(**changes):
    values = dict.fromkeys((field.name for field in fields(Reading)), "") | {"fingerprint": (), "fault": None}
    return replace(Reading(**values), **changes)


def test_a_line_cut_short_is_as_good_as_none_and_costs_no_other(tmp_path):
    first, second, third = "a" * 64, "b" * 64, "c" * 64
    KnownReadings(tmp_path).add([(first, reading(content="1")), (second, reading(content="2"))])
    file = KnownReadings(tmp_path).file
    file.write_bytes(file.read_bytes()[:-20])
    KnownReadings(tmp_path).add([(third, reading(content="3"))])
    known = KnownReadings(tmp_path)
    assert known.get(first).content == "1"
    assert known.get(second) is None
    assert known.get(third).content == "3"
    file.write_text(f"{first} {{nonsense}}\n")
    assert KnownReadings(tmp_path).get(first) is None
