// The API, as /openapi.json (OpenAPI 3.1) describes it: routes with their fields and answers, then the types.

const $ = (id) => document.getElementById(id);

/** An element with children; text stays text. */
function make(tag, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
}

/** Words with `names` in them. */
const prose = (text) => text.split("`").map((part, at) => (at % 2 ? make("code", {}, part) : part));
const anchor = (text) => text.replace(/[^A-Za-z0-9]+/g, "-");
/** A Markdown text: each of its lines is a line, and `names` are code. */
const lines = (text) =>
  text.split("\n").flatMap((line, at) => [...(at ? [make("br")] : []), ...prose(line.replace(/^- /, ""))]);
const typeName = (ref) => ref.split("/").pop();

/** A schema in a few words: what is named has a section of its own, and is linked. */
function type(schema) {
  if (!schema) return ["anything"];
  if (schema.$ref) return [make("a", { href: `#type-${typeName(schema.$ref)}` }, typeName(schema.$ref))];
  const either = schema["x-event-data"] ?? schema;
  const options = either.anyOf ?? either.oneOf;
  if (options) return options.flatMap((option, at) => (at ? [" or ", ...type(option)] : type(option)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...type(schema.items)];
  if (schema.type === "object" && typeof schema.additionalProperties === "object") {
    return ["object of ", ...type(schema.additionalProperties)];
  }
  return [[schema.type ?? "anything"].flat().join(" or ")];
}

const LIMITS = {
  minimum: "≥ ", exclusiveMinimum: "> ", maximum: "≤ ", exclusiveMaximum: "< ", minLength: "length ≥ ",
  maxLength: "length ≤ ", minItems: "items ≥ ", maxItems: "items ≤ ", pattern: "",
};

function limits(schema) {
  const own = Object.entries(LIMITS).filter(([name]) => name in schema).map(([name, sign]) => sign + schema[name]);
  return [...own, ...(schema.anyOf ?? []).flatMap(limits)];
}

/** What a field says beside its name and type. */
function notes(schema, required) {
  const said = [schema.description, required && "required", ...limits(schema)];
  const { default: standard } = schema;
  if (standard && typeof standard !== "object") said.push(`default ${JSON.stringify(standard)}`);
  const example = JSON.stringify(schema.example ?? schema.examples?.[0]);
  if (example?.length < 50) said.push(`such as \`${example}\``);
  return prose(said.filter(Boolean).join(" · "));
}

function table(title, columns, rows) {
  if (!rows.length) return "";
  const head = make("tr", {}, ...columns.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, ...[cell].flat()))));
  const made = make("table", { ariaLabel: title }, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", {}, make("h3", {}, title), made);
}

function fields(title, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, one]) => [
    name, type(one), notes(one, required.has(name)),
  ]);
  return table(title, ["field", "type", "about"], rows);
}

function section(id, title, ...children) {
  return make("section", { id, className: "card", ariaLabel: title }, make("h2", {}, title), ...children);
}

function operation(title, told, types, shared) {
  const given = (told.parameters ?? []).map((one) => [
    one.name, type(one.schema), [`in the ${one.in} · `, ...notes({ ...one.schema, ...one }, one.required)],
  ]);
  const { schema: body, examples = {} } = told.requestBody?.content["application/json"] ?? {};
  const bodies = Object.values(examples).map(({ value }) => make("pre", {}, JSON.stringify(value, null, 2)));
  const answers = Object.entries(told.responses ?? {}).map(([status, own]) => {
    const answer = own.$ref ? shared[typeName(own.$ref)] : own;
    const shown = Object.entries(answer.content ?? {});
    const kinds = shown.flatMap(([media, { schema }]) => [make("br"), `${media}: `, ...type(schema)]);
    return [status, [...lines(answer.description), ...(Number(status) < 400 ? kinds : [])]];
  });
  const isPublic = told.security?.length === 0;
  return section(
    anchor(title), title,
    make("p", {}, ...prose(told.summary ?? ""), isPublic ? " No key needed." : ""),
    table("Parameters", ["name", "type", "about"], given),
    body ? fields("Body (application/json)", body.$ref ? types[typeName(body.$ref)] ?? {} : body) : "",
    bodies.length ? make("h3", {}, "Examples of the body") : "",
    ...bodies,
    table("Answers", ["status", "about"], answers),
  );
}

function show(document) {
  const types = document.components?.schemas ?? {};
  const shared = document.components?.responses ?? {};
  $("title").textContent = `${document.info.title} API`;
  const file = make("a", { href: "/openapi.json" }, "/openapi.json");
  const about = prose(document.info.description ?? "");
  $("about").replaceChildren(...about, ` Version ${document.info.version}; from `, file, ".");
  for (const [path, methods] of Object.entries(document.paths)) {
    for (const [method, told] of Object.entries(methods)) {
      const title = `${method.toUpperCase()} ${path}`;
      $("routes").append(operation(title, told, types, shared));
      $("contents").append(make("a", { href: `#${anchor(title)}` }, title));
    }
  }
  for (const [name, schema] of Object.entries(types)) {
    const what = schema.properties ? fields("Fields", schema) : make("p", {}, ...type(schema));
    $("routes").append(section(`type-${name}`, name, make("p", {}, ...prose(schema.description ?? "")), what));
  }
  if (location.hash) window.document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`status ${response.status}`);
  show(await response.json());
} catch (error) {
  $("about").textContent = `This gateway's /openapi.json cannot be shown (${error.message}).`;
}
