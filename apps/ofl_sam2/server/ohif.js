
// Two commands of OHIF 3.10.0-beta.5 are called storeSegmentation: CORNERSTONE's, which the menu means and which picks the
// server, and SEGMENTATION's, which stores on the server it is given. The later one wins, and "Export DICOM SEG" ends in
// an error. This extension sends each call to the right one.
window.config.extensions.push({
  id: 'ofl-sam2.export',
  onModeEnter: ({ commandsManager }) => {
    const context = 'OFL_SAM2';
    if (!commandsManager.getContext('SEGMENTATION') || commandsManager.getContext(context)) return;
    commandsManager.createContext(context);
    commandsManager.registerCommand(context, 'storeSegmentation', {
      commandFn: options =>
        commandsManager.runCommand('storeSegmentation', options, options.dataSource ? 'SEGMENTATION' : 'CORNERSTONE'),
    });
  },
});
