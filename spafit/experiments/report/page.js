"use strict";
// Without this script everything is there; with it, a table is sorted by a click on its head.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      const rows = [...body.rows].filter((row) => !row.classList.contains("base"));
      const key = (row) => row.cells[column];
      rows.sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        const [x, y] = [a.dataset.v, b.dataset.v];
        if (x !== undefined && y !== undefined) return down * (x - y);
        if (x !== undefined || y !== undefined) return x !== undefined ? -1 : 1;
        const [s, t] = [a.textContent, b.textContent];
        if (s === "" || t === "") return (s === "") - (t === "");
        return down * s.localeCompare(t, "en", { numeric: true });
      });
      body.append(...rows);
    });
  });
}
