"""4x4 and 6x6 Sudoku: with exactly one solution, or with few clues and many solutions.

A prompt is `S6:` (or `S4:`), the cells row by row with `0` for a blank, and `=`; the answer is
the full grid. Boxes are 2x2 in 4x4, and 2 rows by 3 columns in 6x6.
"""

import random
from collections.abc import Iterator
from typing import ClassVar

from boe_vllm.lab.tasks.base import GeneratedTask, Item, split_of


class Board:
    """The geometry of one grid size, a solver, and the symmetries of the rules."""

    def __init__(self, *, size: int, box_rows: int, box_cols: int) -> None:
        assert box_rows * box_cols == size
        self.size, self.box_rows, self.box_cols = size, box_rows, box_cols
        self.cells = size * size
        per_row = size // box_cols
        place = [divmod(cell, size) for cell in range(self.cells)]
        # Units of a cell as indices into one list of used-digit masks: row, column, box.
        self.units = [
            (r, size + c, 2 * size + (r // box_rows) * per_row + c // box_cols) for r, c in place
        ]

    def solutions(self, grid: str, *, limit: int, rng: random.Random | None = None) -> list[str]:
        """Up to `limit` completions of `grid` (`0` is blank), in random order if `rng`."""
        used = [0] * (3 * self.size)
        blank = []
        for cell, char in enumerate(grid):
            bit = 1 << int(char)
            if bit == 1:
                blank.append(cell)
                continue
            for unit in self.units[cell]:
                if used[unit] & bit:
                    return []
                used[unit] |= bit
        values = [int(char) for char in grid]
        found: list[str] = []
        self._search(values, used, blank, limit, rng, found)
        return found

    def _search(self, values, used, blank, limit, rng, found) -> None:
        if not blank:
            found.append("".join(map(str, values)))
            return
        every = (2 << self.size) - 2
        best, best_free, fewest = 0, 0, self.size + 1
        for index, cell in enumerate(blank):
            a, b, c = self.units[cell]
            free = every & ~(used[a] | used[b] | used[c])
            count = free.bit_count()
            if count < fewest:
                best, best_free, fewest = index, free, count
                if count <= 1:
                    break
        if not best_free:
            return
        cell = blank[best]
        rest = blank[:best] + blank[best + 1 :]
        a, b, c = self.units[cell]
        digits = [digit for digit in range(1, self.size + 1) if best_free >> digit & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << digit
            values[cell] = digit
            used[a] |= bit
            used[b] |= bit
            used[c] |= bit
            self._search(values, used, rest, limit, rng, found)
            used[a] ^= bit
            used[b] ^= bit
            used[c] ^= bit
            if len(found) >= limit:
                break
        values[cell] = 0

    def random_solution(self, rng: random.Random) -> str:
        """A full grid; a random first row, then random choices, then a random symmetry."""
        row = list(range(1, self.size + 1))
        rng.shuffle(row)
        start = "".join(map(str, row)) + "0" * (self.cells - self.size)
        (grid,) = self.solutions(start, limit=1, rng=rng)
        return self.symmetry(rng, grid)[0]

    def symmetry(self, rng: random.Random, *grids: str) -> tuple[str, ...]:
        """The grids under one random symmetry: it keeps validity and unique solutions.

        Digits are relabelled, rows permuted within and among bands, columns within and
        among stacks.
        """
        digits = "".join(map(str, range(1, self.size + 1)))
        relabel = str.maketrans(digits, "".join(rng.sample(digits, self.size)))
        rows = self._lines(rng, self.box_rows)
        cols = self._lines(rng, self.box_cols)
        order = [r * self.size + c for r in rows for c in cols]
        return tuple("".join([g[i] for i in order]).translate(relabel) for g in grids)

    def _lines(self, rng: random.Random, per_band: int) -> list[int]:
        bands = rng.sample(range(self.size // per_band), self.size // per_band)
        return [b * per_band + k for b in bands for k in rng.sample(range(per_band), per_band)]

    def is_grid(self, text: str) -> bool:
        """Whether a text is one digit for each cell."""
        return len(text) == self.cells and text.isascii() and text.isdigit()

    def is_solved(self, grid: str) -> bool:
        """Whether every row, column and box holds every digit once."""
        if not self.is_grid(grid):
            return False
        seen = [0] * (3 * self.size)
        for cell, char in enumerate(grid):
            for unit in self.units[cell]:
                seen[unit] |= 1 << int(char)
        return all(mask == (2 << self.size) - 2 for mask in seen)

    def solves(self, puzzle: str, grid: str) -> bool:
        """Whether `grid` is solved and keeps the clues of `puzzle`, where `0` is blank."""
        return self.is_solved(grid) and all(
            clue in ("0", cell) for clue, cell in zip(puzzle, grid, strict=True)
        )

    def cell_accuracy(self, puzzle: str, solution: str, grid: str) -> float | None:
        """Share of the puzzle's blanks that `grid` fills as the solution does; None if it is no
        grid."""
        if not self.is_grid(grid):
            return None
        blanks = [place for place, clue in enumerate(puzzle) if clue == "0"]
        return sum(grid[i] == solution[i] for i in blanks) / len(blanks)


BOARD4 = Board(size=4, box_rows=2, box_cols=2)
BOARD6 = Board(size=6, box_rows=2, box_cols=3)


class SudokuTask(GeneratedTask):
    """Fill a grid. Subclasses choose the board and how clues are picked."""

    board: Board

    def make_item(self, puzzle: str, solution: str) -> Item:
        return Item(
            task=self.name,
            prompt=f"S{self.board.size}:{puzzle}=",
            answer=solution,
            meta={"clues": self.board.cells - puzzle.count("0")},
        )

    def puzzle_of(self, item: Item) -> str:
        """The cells of the prompt, `0` for a blank."""
        return item.prompt[3:-1]

    def is_valid(self, item: Item, answer: str) -> bool:
        return self.board.solves(self.puzzle_of(item), answer)


class UniqueSudoku(SudokuTask):
    """Puzzles with exactly one solution and at most `max_clues` clues."""

    min_clues: int
    max_clues: int
    pool_size = 3000

    def generate(self, rng: random.Random) -> Item:
        while True:
            solution = self.board.random_solution(rng)
            cells = list(solution)
            clues = self.board.cells
            for cell in rng.sample(range(self.board.cells), self.board.cells):
                kept, cells[cell] = cells[cell], "0"
                if len(self.board.solutions("".join(cells), limit=2)) == 1:
                    clues -= 1
                    if clues == self.min_clues:
                        break
                else:
                    cells[cell] = kept
            if clues <= self.max_clues:
                return self.make_item("".join(cells), solution)

    def generate_for(self, rng: random.Random, split: str) -> Item:
        # A symmetric puzzle costs a hundredth of a fresh one.
        item = self.generate(rng)
        while split_of(item.prompt) != split:
            item = self._symmetric(rng, item)
        return item

    def stream(self, *, seed: int = 0) -> Iterator[Item]:
        """Symmetries of a pool of puzzles: fresh ones would take too long in training."""
        rng = random.Random(f"{self.name}/stream/{seed}")
        pool = [self.generate(rng) for _ in range(self.pool_size)]
        while True:
            item = self._symmetric(rng, rng.choice(pool))
            if split_of(item.prompt) == "train":
                yield item

    def _symmetric(self, rng: random.Random, item: Item) -> Item:
        return self.make_item(*self.board.symmetry(rng, self.puzzle_of(item), item.answer))

    def cell_accuracy(self, item: Item, answer: str) -> float | None:
        return self.board.cell_accuracy(self.puzzle_of(item), item.answer, answer)


class Sudoku4(UniqueSudoku):
    """4x4, 4 to 6 clues, one solution."""

    name = "sudoku4"
    gen_length = block_length = 16
    board = BOARD4
    min_clues, max_clues = 4, 6


class Sudoku6(UniqueSudoku):
    """6x6, 10 to 12 clues, one solution."""

    name = "sudoku6"
    gen_length = block_length = 36
    board = BOARD6
    min_clues, max_clues = 10, 12


class FewClues(SudokuTask):
    """A few clues of a random grid: many solutions, any of them is right."""

    clues: ClassVar[int]

    def generate(self, rng: random.Random) -> Item:
        solution = self.board.random_solution(rng)
        shown = set(rng.sample(range(self.board.cells), self.clues))
        puzzle = "".join(c if i in shown else "0" for i, c in enumerate(solution))
        return self.make_item(puzzle, solution)


class Sudoku4Few(FewClues):
    """4x4, 3 clues of 16: several solutions, any of them is right."""

    name = "sudoku4-few"
    gen_length = block_length = 16
    board = BOARD4
    clues = 3


class Sudoku6Few(FewClues):
    """6x6, 6 clues of 36: many solutions, any of them is right."""

    name = "sudoku6-few"
    gen_length = block_length = 36
    board = BOARD6
    clues = 6
