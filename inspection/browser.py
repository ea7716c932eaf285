"""A terminal browser with three linked views: the model's source, the IR at any stage, the plan."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text

from ..errors import EffccError, MissingExtraError
from .colours import coloured, short_paths
from .history import node_history
from .links import IrLine, Links, PlanRow
from .model_source import SourceFile, short_path
from .stages import Dump, Stage

try:
    from textual.app import App, ComposeResult
    from textual.binding import Binding
    from textual.containers import Horizontal, Vertical
    from textual.screen import ModalScreen
    from textual.widgets import Footer, Input, Label, OptionList
    from textual.widgets.option_list import Option
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "textual":
        raise
    raise MissingExtraError(
        "the terminal browser needs textual",
        remedy="pip install 'effcc[tui]'; without it: --show, --diff, --node, --find",
    ) from error

#: Below this many columns the views stand one under another.
NARROW = 110


def browse(dump: Dump) -> None:
    """Run the browser until the user leaves it."""
    Browser(dump).run()


class Lines(ModalScreen[None]):
    """A text over the three views; escape closes it."""

    BINDINGS: ClassVar[list[Any]] = [Binding("escape,q", "dismiss", "Close")]
    CSS = """
    Lines { align: center middle; }
    #lines { width: 92%; height: 88%; border: round $accent; background: $surface; }
    """

    def __init__(self, title: str, lines: list[Text]) -> None:
        super().__init__()
        self.heading, self.listed = title, lines

    def compose(self) -> ComposeResult:
        listing = OptionList(*(Option(line) for line in self.listed), id="lines")
        listing.border_title = self.heading
        yield listing


class Browser(App[None]):
    """Source on the left, IR in the middle, plan on the right. What is highlighted in the view with the focus is shown
    in the other two."""

    TITLE = "effcc inspect"
    CSS = """
    #views { layout: horizontal; }
    .narrow #views { layout: vertical; }
    .view { width: 1fr; height: 1fr; }
    .narrow .view { width: 100%; }
    .view Label { width: 100%; background: $panel; padding: 0 1; text-style: bold; }
    .view OptionList { height: 1fr; border: none; padding: 0; text-wrap: nowrap; text-overflow: ellipsis; }
    .view:focus-within Label { background: $accent; color: $text; }
    #query { display: none; dock: bottom; }
    #query.shown { display: block; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        Binding("tab", "focus_next", "Next view", show=False),
        Binding("left_square_bracket", "stage(-1)", "Stage before", key_display="["),
        Binding("right_square_bracket", "stage(1)", "Stage after", key_display="]"),
        Binding("comma", "file(-1)", "File before", key_display=",", show=False),
        Binding("full_stop", "file(1)", "Next file", key_display="."),
        Binding("slash", "query", "Find", key_display="/"),
        Binding("h", "history", "History"),
        Binding("d", "difference", "Changes"),
        Binding("p", "peak", "Peak"),
        Binding("escape", "close_query", "Close", show=False),
        Binding("q", "quit", "Leave"),
    ]

    def __init__(self, dump: Dump) -> None:
        super().__init__()
        self.links = Links(dump)
        self.stage: Stage = self._first_stage()
        self.file: SourceFile | None = self.links.files[0] if self.links.files else None
        self.ir: list[IrLine] = []
        self.rows: list[PlanRow] = []
        self.line_numbers: list[int] = []

    def _first_stage(self) -> Stage:
        graphs = list(self.links.dump.last().values())
        return graphs[0] if graphs else self.links.stages[0]

    def compose(self) -> ComposeResult:
        with Horizontal(id="views"):
            for name in ("source", "ir", "plan"):
                with Vertical(classes="view"):
                    yield Label(name, id=f"{name}-title")
                    yield OptionList(id=name)
        yield Input(placeholder="model.py:88   >100MiB   f32[2,256]   layers.*.mlp   a name or an op", id="query")
        yield Footer()

    def on_mount(self) -> None:
        self._show_file()
        self._show_stage()
        self._show_rows(self.links.at_peak(), "plan")
        self.query_one("#ir", OptionList).focus()

    def on_resize(self, event: Any) -> None:
        self.screen.set_class(event.size.width < NARROW, "narrow")

    # --- the three views ----------------------------------------------------------------------------------------------

    def _fill(self, view: str, title: str, lines: list[Text]) -> None:
        listing = self.query_one(f"#{view}", OptionList)
        listing.clear_options()
        listing.add_options([Option(line) for line in lines])
        self.query_one(f"#{view}-title", Label).update(Text(title, no_wrap=True, overflow="ellipsis"))

    def _show_file(self) -> None:
        file = self.file
        if file is None:
            self._fill("source", "source: none is known", [])
            return
        self.line_numbers = sorted(file.lines)
        shown = []
        for number in self.line_numbers:
            mark = "*" if number in file.used else " "
            line = Text(f"{number:>5} {mark} ", style="dim" if mark == " " else "bold", no_wrap=True)
            shown.append(line.append_text(coloured(file.lines[number], code=True)))
        part = "" if file.whole else " (only the lines that made ops)"
        self._fill("source", f"source: {file.name}{part}", shown)

    def _show_stage(self) -> None:
        self.ir = self.links.lines(self.stage)
        code = self.stage.is_code
        where = "" if code else f" of {self.stage.graph}"
        title = f"ir: {self.stage.index} {self.stage.label}{where}, {self.stage.ops} ops"
        self._fill("ir", title, [coloured(line.text, code) for line in self.ir])

    def _show_rows(self, rows: list[PlanRow], title: str) -> None:
        self.rows = rows
        self._fill(
            "plan", title, [Text(row.text, style="bold" if row.kind == "note" else "", no_wrap=True) for row in rows]
        )

    # --- links --------------------------------------------------------------------------------------------------------

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_list is not self.focused:  # it was moved by a link
            return
        if event.option_list.id == "source":
            self._from_source(self.line_numbers[event.option_index])
        elif event.option_list.id == "ir":
            self._from_ir(self.ir[event.option_index])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_list.id == "plan":
            self._from_plan(self.rows[event.option_index])
        elif event.option_list.id == "ir":
            self.action_history()

    def _from_source(self, number: int) -> None:
        if self.file is None:
            return
        path = self.file.path
        self._move("ir", next((i for i, each in enumerate(self.ir) if (each.file, each.line) == (path, number)), None))
        self._show_rows(self.links.of_line(self.file, number), "plan of this line")

    def _from_ir(self, line: IrLine) -> None:
        if line.file:
            self._to_source(line.file, line.line)
        if line.name:
            self._show_rows(self.links.of_value(self.stage.graph, (line.scope, line.name)), "plan of this value")

    def _from_plan(self, row: PlanRow) -> None:
        path, _, number = row.source.rpartition(":")
        if path and number.isdigit():
            self._to_source(path, int(number))
        stage = self.links.last_stage(row.graph)
        if stage is None or not row.ops:
            return
        if stage.index != self.stage.index:
            self.stage = stage
            self._show_stage()
        self._move("ir", next((i for i, each in enumerate(self.ir) if each.name in row.ops), None))

    def _to_source(self, path: str, number: int) -> None:
        file = self.links.file_of(path)
        if file is None:
            return
        if file is not self.file:
            self.file = file
            self._show_file()
        self._move("source", self.line_numbers.index(number) if number in file.lines else None)

    def _move(self, view: str, index: int | None) -> None:
        if index is not None:
            self.query_one(f"#{view}", OptionList).highlighted = index

    # --- actions ------------------------------------------------------------------------------------------------------

    def action_stage(self, by: int) -> None:
        """The stage before or after this one; the same value stays highlighted where it is there."""
        stages = self.links.stages
        index = next((i for i, each in enumerate(stages) if each.index == self.stage.index), 0) + by
        if not 0 <= index < len(stages):
            return
        line = self._chosen_line()
        self.stage = stages[index]
        self._show_stage()
        if line is not None and line.name:
            same = ((i, each) for i, each in enumerate(self.ir) if each.name == line.name)
            self._move("ir", next((i for i, each in same), None))

    def action_file(self, by: int) -> None:
        files = self.links.files
        if self.file is None or not files:
            return
        self.file = files[(files.index(self.file) + by) % len(files)]
        self._show_file()

    def action_query(self) -> None:
        query = self.query_one("#query", Input)
        query.add_class("shown")
        query.focus()

    def action_close_query(self) -> None:
        self.query_one("#query", Input).remove_class("shown")
        self.query_one("#ir", OptionList).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        try:
            rows = self.links.search(event.value)
        except EffccError as error:
            self.notify(error.message, severity="error")
            return
        self.query_one("#query", Input).remove_class("shown")
        self._show_rows(rows, f"found: {event.value}")
        self.query_one("#plan", OptionList).focus()

    def action_history(self) -> None:
        line = self._chosen_line()
        if line is None or not line.name or self.stage.is_code:
            self.notify("choose a value in the IR first")
            return
        history = node_history(self.links.dump, f"{self.stage.graph}:{line.name}")
        shown = [Text(f"%{history.name} comes from {short_path(history.source) or 'no known line'}", style="bold")]
        for event in history.events:
            shown.append(Text.assemble(("\n" + event.stage, "bold"), f"  {event.what}"))
            shown += [Text("    ").append_text(coloured(short_paths(each))) for each in event.lines]
        self.push_screen(Lines("history", shown))

    def action_difference(self) -> None:
        """What this stage changed."""
        from ..cli_opt import text_diff

        chain = self.links.dump.chains().get(self.stage.graph, [])
        place = next((i for i, each in enumerate(chain) if each.index == self.stage.index), 0)
        if place == 0:
            self.notify("this is the first stage of its graph")
            return
        before = chain[place - 1]
        styles = {"+": "green", "-": "red", "@": "cyan"}
        text = text_diff(before.text(), self.stage.text(), before.label, self.stage.label)
        lines = [Text(short_paths(line), style=styles.get(line[:1], ""), no_wrap=True) for line in text.splitlines()]
        self.push_screen(Lines(f"{before.label} -> {self.stage.label}", lines))

    def action_peak(self) -> None:
        self._show_rows(self.links.at_peak(), "plan")

    def _chosen_line(self) -> IrLine | None:
        index = self.query_one("#ir", OptionList).highlighted
        return self.ir[index] if index is not None and index < len(self.ir) else None
