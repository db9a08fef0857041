
"use strict";
(() => {
  // Data from the store is inserted as text only: `textContent`, never HTML.
  const { columns, lists, outputs, rows } = JSON.parse(document.getElementById("fleet").textContent);
  const at = Object.fromEntries(columns.map((name, place) => [name, place]));
  const ON_A_PAGE = 50;
  const MOST_PRINTED = 2000;

  // Sizes and numbers as every icm command prints them.
  function size(bytes) {
    if (bytes === null) return "";
    let value = bytes, unit = "B";
    for (const larger of ["KiB", "MiB", "GiB", "TiB", "PiB"]) {
      if (value < 1023.95) break;
      value /= 1024;
      unit = larger;
    }
    return unit === "B" ? `${value} B` : `${tenths(value)} ${unit}`;
  }
  function tenths(value) {  // exact halves go to the even digit, as in Python
    const scaled = value * 10, whole = Math.floor(scaled);
    const rounded = scaled - whole === 0.5 ? whole + (whole % 2) : Math.round(scaled);
    return (rounded / 10).toFixed(1);
  }
  const thousandths = (value) => (value === null ? "" : value.toFixed(3));
  const percent = (value) => (value === null ? "" : `${(100 * value).toFixed(1)}%`);
  const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
  const listed = (name, row) => (row[at[name]] === null ? "" : lists[name][row[at[name]]]);

  const has = (name) => rows.some((row) => row[at[name]] !== null && row[at[name]].length !== 0);
  const gain = (row) => thousandths(row[at.gain]) + (row[at.precision] ?? "");
  const COLUMNS = [
    { name: "name", title: "Task" },
    { name: "base", title: "Base model", text: (row) => listed("base", row), hidden: lists.base.length < 2 },
    { name: "rank", title: "Rank", number: true, text: (row) => String(row[at.rank]) },
    { name: "original", title: "Original", number: true, text: (row) => size(row[at.original]) },
    { name: "size", title: "Replaced by", number: true, text: (row) => size(row[at.size]), hidden: !has("size") },
    { name: "share", title: "Of bf16", number: true, text: (row) => percent(row[at.share]), hidden: !has("share") },
    { name: "error", title: "Relative error", number: true, text: (row) => thousandths(row[at.error]), hidden: !has("error") },
    { name: "gain", title: "Retained gain", number: true, text: gain, hidden: !has("gain") },
    { name: "kept", title: "Stored as", text: (row) => listed("kept", row) },
    { name: "tags", title: "Tags", hidden: !has("tags") },
  ].filter((column) => !column.hidden);

  // The view is kept in the address, so that a link or a reload restores it.
  const FIRST = { q: "", base: "", tag: "", kept: "", sort: "name", page: "1", task: "" };
  let state = { ...FIRST };
  let found = [];  // places of the rows that pass, in order
  const haystacks = [];

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }
  const form = document.querySelector(".search");
  const head = document.querySelector(".tasks thead tr");
  const body = document.querySelector(".tasks tbody");
  const count = document.querySelector(".count");
  const pager = document.querySelector(".pages");
  const markers = new Map();
  for (const marker of document.querySelectorAll("svg [data-row]")) {
    const row = Number(marker.dataset.row);
    markers.set(row, [...(markers.get(row) ?? []), marker]);
  }

  function haystack(place) {
    if (haystacks[place] === undefined) {
      const row = rows[place];
      const tags = row[at.tags].map((tag) => lists.tags[tag]);
      const texts = [row[at.name], listed("base", row), listed("kept", row), listed("targets", row), ...tags, row[at.note] ?? ""];
      haystacks[place] = [...texts, ...row[at.marks]].join("\n").toLowerCase();
    }
    return haystacks[place];
  }

  function select() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = (name, value) => (value === "" ? -1 : lists[name].indexOf(value));
    const [base, tag, kept] = [wanted("base", state.base), wanted("tags", state.tag), wanted("kept", state.kept)];
    found = [];
    for (let place = 0; place < rows.length; place += 1) {
      const row = rows[place];
      if (state.base !== "" && row[at.base] !== base) continue;
      if (state.kept !== "" && row[at.kept] !== kept) continue;
      if (state.tag !== "" && !row[at.tags].includes(tag)) continue;
      if (words.length && !words.every((word) => haystack(place).includes(word))) continue;
      found.push(place);
    }
    order();
  }

  // Rows come sorted by name, and lists are sorted, so that every column is compared by numbers.
  function order() {
    const [name, direction] = state.sort.split(":");
    const sign = direction === "desc" ? -1 : 1;
    const place = at[name];
    let key = (number) => rows[number][place];
    if (name === "name") key = (number) => number;
    if (name === "tags") key = (number) => tagOrder(rows[number][place]);
    const keys = new Map(found.map((number) => [number, key(number)]));
    found.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === b) return one - other;
      if (a === null) return 1;  // unmeasured tasks come last in either direction
      if (b === null) return -1;
      return sign * (a - b);
    });
  }
  const inTurn = (one, other) => one.reduce((soFar, tag, place) => soFar || tag - (other[place] ?? -1), 0) || one.length - other.length;
  const tagSets = new Map(rows.map((row) => row[at.tags]).sort(inTurn).map((tags, number) => [tags.join(), number]));
  const tagOrder = (tags) => (tags.length ? tagSets.get(tags.join()) : null);

  function cell(column, row) {
    if (column.name === "tags") {
      return element("td", {}, ...row[at.tags].map((tag) =>
        element("button", { type: "button", className: "tag", textContent: lists.tags[tag], title: "Only tasks with this tag" })));
    }
    const text = column.text(row);
    const made = element("td", { textContent: text, className: column.number ? "number" : column.name });
    if (column.name === "base") made.title = text;
    return made;
  }

  function line(place) {
    const row = rows[place];
    const isOpen = state.task === row[at.name];
    const button = element("button", { type: "button", textContent: row[at.name], ariaExpanded: String(isOpen) });
    const made = element("tr", { className: "row" }, element("th", { scope: "row" }, button),
      ...COLUMNS.slice(1).map((column) => cell(column, row)));
    made.dataset.row = place;
    return isOpen ? [made, details(place)] : [made];
  }

  function details(place) {
    const row = rows[place];
    const facts = [
      ["Base model", listed("base", row)],
      ["Target modules", listed("targets", row)],
      ["Parameters", `${row[at.parameters].toLocaleString("en")}, ${listed("dtype", row)}`],
      ["Code", size(row[at.code])],
      ["Task vectors", row[at.vectors] ? size(row[at.vectors]) : ""],
      ["Extras", row[at.extras] ? size(row[at.extras]) : ""],
      ["Cluster on the map", row[at.cluster] === null ? "" : String(row[at.cluster])],
      ["Nearest task", row[at.nearest] === null ? "" : `${row[at.nearest][0]}, distance ${thousandths(row[at.nearest][1])}`],
      ["Status", row[at.marks].join(", ")],
      ["Ingested", row[at.created]],
      ["Limits that no code meets", row[at.limits] ?? "", true],
      ["Reason for no code", listed("why", row), true],
      ["Note", row[at.note] ?? "", true],
    ];
    const list = element("dl");
    for (const [title, text, isLong] of facts) {
      if (text === "") continue;
      list.append(element("div", { className: isLong ? "long" : "" }, element("dt", { textContent: title }), element("dd", { textContent: text })));
    }
    const cellOfAll = element("td", { colSpan: COLUMNS.length }, list);
    if (outputs[place] !== undefined) {
      cellOfAll.append(element("p", {}, element("a", { href: `#outputs-${outputs[place]}`, textContent: "Outputs" })));
    }
    return element("tr", { className: "more" }, cellOfAll);
  }

  const pages = () => Math.max(1, Math.ceil(found.length / ON_A_PAGE));
  const page = () => Math.min(pages(), Math.max(1, Math.trunc(Number(state.page)) || 1));

  function draw(all = false) {
    const first = all ? 0 : (page() - 1) * ON_A_PAGE;
    body.replaceChildren(...found.slice(first, all ? undefined : first + ON_A_PAGE).flatMap(line));
    const sum = (name) => found.reduce((total, place) => total + (rows[place][at[name]] ?? 0), 0);
    const coded = found.filter((place) => rows[place][at.size] !== null).length;
    const which = coded === found.length ? "Their codes" : `The codes of ${coded.toLocaleString("en")}`;
    const replaced = coded ? ` ${which} with vectors and extras take ${size(sum("size"))}.` : "";
    const of = found.length === rows.length ? "" : ` of ${rows.length.toLocaleString("en")}`;
    count.textContent = found.length
      ? `${found.length.toLocaleString("en")}${of || (found.length === 1 ? " task" : " tasks")}${of && " tasks"}. The originals take ${size(sum("original"))}.${replaced}`
      : "No task matches the filters.";
    pager.hidden = pages() === 1;
    pager.querySelector("span").textContent = `Page ${page()} of ${pages()}`;
    pager.querySelector('[data-step="-1"]').disabled = page() === 1;
    pager.querySelector('[data-step="1"]').disabled = page() === pages();
    for (const heading of head.children) {
      const [name, direction] = state.sort.split(":");
      if (heading.dataset.name === name) heading.ariaSort = direction === "desc" ? "descending" : "ascending";
      else heading.removeAttribute("aria-sort");
    }
    point(rows.findIndex((row) => row[at.name] === state.task));
  }

  function show(changes) {
    state = { ...state, ...changes };
    const told = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value !== FIRST[name]) told.set(name, value);
    history.replaceState(null, "", `#${told}`);
    fill();
    select();
    draw();
  }
  function fill() {
    for (const name of ["q", "base", "tag", "kept"]) {
      if (form.elements[name].value !== state[name]) form.elements[name].value = state[name];
    }
  }

  // The same task in the table and in the pictures.
  let pointed = -1;
  function point(place) {
    for (const marker of markers.get(pointed) ?? []) marker.classList.remove("near");
    body.querySelector(`[data-row="${pointed}"]`)?.classList.remove("near");
    pointed = place;
    for (const marker of markers.get(place) ?? []) marker.classList.add("near");
    body.querySelector(`[data-row="${place}"]`)?.classList.add("near");
  }
  function tell(place) {
    const row = rows[place];
    const parts = [row[at.name], listed("kept", row), size(row[at.original])];
    if (row[at.size] !== null) parts.push(`replaced by ${size(row[at.size])}`);
    if (row[at.error] !== null) parts.push(`relative error ${thousandths(row[at.error])}`);
    if (row[at.gain] !== null) parts.push(`retained gain ${gain(row)}`);
    if (row[at.nearest] !== null) parts.push(`nearest ${row[at.nearest][0]} at ${thousandths(row[at.nearest][1])}`);
    return parts.join(", ");
  }
  function open(place) {
    if (!found.includes(place)) show({ q: "", base: "", tag: "", kept: "" });
    show({ task: rows[place][at.name], page: String(1 + Math.floor(found.indexOf(place) / ON_A_PAGE)) });
    const button = body.querySelector(`[data-row="${place}"] button`);
    button.focus({ preventScroll: true });
    button.scrollIntoView({ block: "center" });
  }

  function read() {
    const told = location.hash.slice(1);
    if (told !== "" && !told.includes("=")) return false;  // an anchor on the page
    const given = new URLSearchParams(told);
    state = Object.fromEntries(Object.entries(FIRST).map(([name, value]) => [name, given.get(name) ?? value]));
    if (!COLUMNS.some((column) => column.name === state.sort.split(":")[0])) state.sort = FIRST.sort;
    fill();
    return true;
  }

  for (const column of COLUMNS) {
    const heading = element("th", { scope: "col", className: column.number ? "number" : "" },
      element("button", { type: "button", textContent: column.title }));
    heading.dataset.name = column.name;
    head.append(heading);
  }
  for (const [control, name] of [["base", "base"], ["tag", "tags"], ["kept", "kept"]]) {
    const used = new Set(rows.flatMap((row) => row[at[name]]));
    const texts = lists[name].filter((text, place) => used.has(place));
    form.elements[control].append(...texts.map((text) => element("option", { value: text, textContent: text })));
    form.elements[control].parentElement.hidden = texts.length < (control === "tag" ? 1 : 2);
  }
  form.hidden = false;

  form.addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["input", "change"]) {  // some ways to choose an option cause only one of them
    form.addEventListener(kind, (event) => {
      if (state[event.target.name] !== event.target.value) show({ [event.target.name]: event.target.value, page: "1" });
    });
  }
  form.addEventListener("reset", () => show({ q: "", base: "", tag: "", kept: "", page: "1", task: "" }));
  head.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (heading === null) return;
    const { name } = heading.dataset;
    const isFirst = state.sort.split(":")[0] !== name;
    // Numbers sort in descending order first.
    const isNumber = COLUMNS.find((column) => column.name === name).number;
    const isDescending = isFirst ? isNumber : !state.sort.endsWith(":desc");
    show({ sort: isDescending ? `${name}:desc` : name, page: "1" });
  });
  pager.addEventListener("click", (event) => {
    const step = Number(event.target.dataset.step ?? 0);
    if (step !== 0) show({ page: String(page() + step) });
  });
  body.addEventListener("click", (event) => {
    if (event.target.className === "tag") {
      show({ tag: event.target.textContent, page: "1" });
      return;
    }
    const row = event.target.closest("tr.row");
    if (row === null || String(getSelection()) !== "") return;  // selecting text is not a click
    const name = rows[Number(row.dataset.row)][at.name];
    show({ task: state.task === name ? "" : name });
    body.querySelector(`[data-row="${row.dataset.row}"] button`).focus({ preventScroll: true });
  });
  body.addEventListener("pointerover", (event) => {
    const row = event.target.closest("tr.row");
    if (row !== null) point(Number(row.dataset.row));
  });
  for (const svg of document.querySelectorAll("figure svg")) {
    const dots = [...svg.querySelectorAll("[data-row]")].filter((dot) => !dot.matches(".original"));
    const told = svg.closest("figure").querySelector(".told");
    const over = (marker) => {
      if (marker === null) return;
      point(Number(marker.dataset.row));
      told.textContent = tell(Number(marker.dataset.row));
    };
    // One dot is in the tab order; the arrow keys move to the others.
    dots.forEach((dot, number) => {
      dot.setAttribute("tabindex", number === 0 ? "0" : "-1");
      dot.setAttribute("role", "button");
    });
    if (dots.length) svg.setAttribute("role", "group");
    svg.addEventListener("pointerover", (event) => over(event.target.closest("[data-row]")));
    svg.addEventListener("focusin", (event) => over(event.target.closest("[data-row]")));
    svg.addEventListener("click", (event) => {
      const marker = event.target.closest("[data-row]");
      if (marker !== null) open(Number(marker.dataset.row));
    });
    svg.addEventListener("keydown", (event) => {
      const here = dots.indexOf(event.target);
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (here < 0 || (step === undefined && event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      if (step === undefined) {
        open(Number(event.target.dataset.row));
        return;
      }
      const next = dots[(here + step + dots.length) % dots.length];
      event.target.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  }
  addEventListener("hashchange", () => {
    if (read()) {
      select();
      draw();
    }
  });
  addEventListener("beforeprint", () => draw(found.length <= MOST_PRINTED));
  addEventListener("afterprint", () => draw());

  read();
  select();
  draw();
})();
