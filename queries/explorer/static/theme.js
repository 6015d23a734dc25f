// Sets the chosen theme before anything is drawn; without a choice the system's holds.
"use strict";
{
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
}
