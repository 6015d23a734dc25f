// Ctrl-Enter runs the statement.

const form = document.getElementById("statement");
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
