// Before anything is drawn: the theme that was chosen the last time, if any.
try {
  const theme = localStorage.getItem("loralib.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is off: the system's theme */ }
