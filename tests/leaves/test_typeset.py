"""Tables in print say what their lines say, one group beside another."""

from study.typeset import best_rows, grouping, latex_table, layout, markdown_table, tex

LINES = [
    ["sharding", "rule", "lr", "validation", "to dense"],
    ["iid", "dense", "3e-05", "34.91 ± 0.21", ""],
    ["iid", "random", "0.01", "36.00 ± 0.10", "+1.09 ± 0.20"],
    ["nc1", "dense", "not run", "", ""],
    ["nc1", "random", "0.1", "9.50", "-0.20 [-1.00, +0.60]"],
]


def test_numbers_are_mathematics_and_words_are_escaped():
    assert tex("34.91 ± 0.21") == r"\ensuremath{34.91 \pm 0.21}"
    assert tex("+2.01 [-1.00, +5.02]") == r"\ensuremath{+2.01\;[-1.00,\,+5.02]}"
    assert tex("-2.00") == r"\ensuremath{-2.00}"
    assert (
        tex("3e-05") == r"\ensuremath{3 \cdot 10^{-5}}" and tex("1e-05") == r"\ensuremath{10^{-5}}"
    )
    assert tex("nc10") == r"\ensuremath{N_c = 10}"
    assert tex("least-sensitive 50% a_b & c#") == r"least-sensitive 50\% a\_b \& c\#"


def test_no_cell_is_markup_or_ends_early():
    text = "a|b\\c{d}~^<e>`*\n\x1b[K](f)"
    row = markdown_table([["x"], [text]]).splitlines()[2]
    assert row == r"| a\|b\\c{d}~^\<e>\`\*\\n\\x1b[K]\(f) |"
    braces = r"a\textbar{}b\textbackslash{}c\{d\}\textasciitilde{}\textasciicircum{}"
    rest = r"\textless{}e\textgreater{}`*\textbackslash{}n\textbackslash{}x1b[K](f)"
    assert tex(text) == braces + rest
    assert tex("\u4e2d") == r"\textbackslash{}u4e2d" and tex("\u0663") == r"\textbackslash{}u0663"


def test_groups_lie_side_by_side_and_what_waits_says_so_once():
    text = latex_table(LINES, 2, ["validation", "to dense"], best_by="validation")
    rows = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if " & " in line]
    assert rows[0][1:] == [r"\multicolumn{2}{c}{iid}", r"\multicolumn{2}{c}{\ensuremath{N_c = 1}}"]
    assert rows[1] == ["rule", *["validation", "to dense"] * 2]
    assert rows[2] == ["dense", r"\ensuremath{34.91 \pm 0.21}", "", "not run", ""]
    best = r"\bestresult{\ensuremath{36.00 \pm 0.10}}"
    assert rows[3][1] == best and rows[3][3] == r"\bestresult{\ensuremath{9.50}}"
    assert text.count(r"\begin{tabular}{@{}lrrrr@{}}") == 1


def test_the_best_is_a_number_and_not_the_first_digits():
    heading, *rows = LINES
    assert best_rows(rows[:2] + [["iid", "x", "1", "9.90", ""]], heading, "validation", 0) == [
        rows[1]
    ]


def test_rows_of_one_key_are_a_plain_table():
    lines = [["head", "validation"], ["ridge", "29.0"], ["probe", "30.0"], ["linear", "not run"]]
    body = latex_table(lines, 1, ["validation"], best_by="validation")
    assert "multicolumn" not in body and r"linear & not run \\" in body
    assert r"probe & \bestresult{\ensuremath{30.0}} \\" in body


def test_measures_that_do_not_fit_side_by_side_give_way_or_the_groups_do():
    columns, rows = LINES[0][:2], [row[:2] for row in LINES[1:]]
    assert layout(columns, rows, ["lr", "a", "b", "c"]) == (0, ["a", "b", "c"])
    assert layout(columns, rows, ["lr", "a", "b", "c", "d"]) == (None, ["lr", "a", "b", "c", "d"])


def test_a_row_without_the_figure_is_not_the_best():
    lines = [["head", "validation"], ["ridge", ""], ["probe", "3.0"]]
    assert best_rows(lines[1:], lines[0], "validation", None) == [lines[2]]


def test_markdown_holds_every_column():
    lines = markdown_table(LINES).splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- |" and len(lines) == 6
    assert lines[2] == "| iid | dense | 3e-05 | 34.91 ± 0.21 |  |"


def test_what_lies_side_by_side():
    columns, rows = LINES[0][:2], [row[:2] for row in LINES[1:]]
    assert grouping(columns, rows) == 0  # the sharding, though either could
    assert grouping(["trains", "J"], rows) == 1
    assert grouping(["trains", "head"], [["head", "a"], ["all", "b"], ["all", "c"]]) is None
    assert grouping(["sharding"], [["iid"], ["nc1"]]) is None


def test_rows_that_are_level_are_best_together():
    rows = [["a", "99.95"], ["b", "99.95"], ["c", "99.90"]]
    assert best_rows(rows, ["rule", "validation"], "validation", None) == rows[:2]
