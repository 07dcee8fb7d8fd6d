
// Repairs of OHIF 3.10.0-beta.5.
window.config.extensions.push({
  id: 'ofl-sam2.repairs',
  onModeEnter: ({ commandsManager, servicesManager }) => {
    showTheRightSeries(servicesManager.services.hangingProtocolService);
    exportSegmentations(commandsManager);
    watchAnswers(servicesManager.services.uiNotificationService);
  },
});

const NEXT_SAMPLE = 'ofl-sam2.next-sample';

// The three views of the MONAI Label mode show the first series that is a volume, which a SEG with a low number also is.
// After "Next Sample", which opens a study, they show the series that was chosen.
function showTheRightSeries(hangingProtocolService) {
  const { activeDisplaySet } = hangingProtocolService.getProtocolById('mpr').displaySetSelectors;
  const own = [
    { attribute: 'Modality', constraint: { doesNotEqual: { value: 'SEG' } }, required: true },
    { attribute: 'SeriesInstanceUID', constraint: { equals: { value: sessionStorage.getItem(NEXT_SAMPLE) } }, weight: 10 },
  ];
  const shipped = activeDisplaySet.seriesMatchingRules.filter(
    rule => !own.some(({ attribute }) => attribute === rule.attribute)
  );
  activeDisplaySet.seriesMatchingRules = [...shipped, ...own];
}

// Two commands are called storeSegmentation: CORNERSTONE's, which the menu means and which picks the server, and
// SEGMENTATION's, which stores on the server it is given. The later one wins, and "Export DICOM SEG" ends in an error.
// A third one, later still, sends each call to the right one. SEGMENTATION's generates what it stores by itself, in the
// wrong order (see inFileOrder), so that is generated once more on its way to the server.
function exportSegmentations(commandsManager) {
  const context = 'OFL_SAM2';
  if (!commandsManager.getContext('SEGMENTATION') || commandsManager.getContext(context)) return;
  commandsManager.createContext(context);

  const store = options => commandsManager.runCommand('storeSegmentation', options, 'SEGMENTATION');
  const generate = options => commandsManager.runCommand('generateSegmentation', options, 'SEGMENTATION');
  const ordered = ({ segmentationId, dataSource }) => {
    const dicom = dataset => {
      const options = { SeriesDescription: dataset.SeriesDescription };
      const { dataset: right } = inFileOrder(segmentationId, () => generate({ segmentationId, options }));
      return dataSource.store.dicom(Object.assign(dataset, right));
    };
    return { segmentationId, dataSource: { ...dataSource, store: { ...dataSource.store, dicom } } };
  };
  commandsManager.registerCommand(context, 'storeSegmentation', {
    commandFn: options =>
      options.dataSource
        ? store(ordered(options))
        : commandsManager.runCommand('storeSegmentation', options, 'CORNERSTONE'),
  });
  commandsManager.registerCommand(context, 'downloadSegmentation', {
    commandFn: options =>
      inFileOrder(options.segmentationId, () =>
        commandsManager.runCommand('downloadSegmentation', options, 'SEGMENTATION')
      ),
  });
}

// A SEG is generated from masks in the order in which the viewer shows them, and from headers which dcmjs sorts along
// the normal of the slices, last first: a series that is shown first to last would be stored mirrored (OHIF issue 5038).
function inFileOrder(segmentationId, generate) {
  const { cache, metaData } = window.cornerstone;
  const labelmap = window.cornerstoneTools.segmentation.state.getSegmentation(segmentationId).representationData.Labelmap;
  const height = imageId => {
    const image = metaData.get('instance', cache.getImage(imageId).referencedImageId);
    const [ax, ay, az, bx, by, bz] = image.ImageOrientationPatient;
    const [x, y, z] = image.ImagePositionPatient;
    return x * (ay * bz - az * by) + y * (az * bx - ax * bz) + z * (ax * by - ay * bx);
  };
  const shown = labelmap.imageIds;
  labelmap.imageIds = [...shown].sort((one, other) => height(other) - height(one));
  try {
    return generate();
  } finally {
    labelmap.imageIds = shown;
  }
}

// The MONAI Label panel says "Failed to Run Segmentation" and no more: the server's sentence is shown beside it. And it
// forgets which series "Next Sample" chose.
function watchAnswers(notifications) {
  const send = XMLHttpRequest.prototype.send;
  if (send.watched) return;
  XMLHttpRequest.prototype.send = function (...body) {
    this.addEventListener('load', () => {
      const { pathname } = new URL(this.responseURL);
      if (this.status >= 400 && pathname.startsWith('/infer/')) {
        const message = answerOf(this).detail;
        notifications.show({ title: 'OFL-SAM2', message, type: 'error', duration: 10000 });
      } else if (this.status < 400 && pathname.startsWith('/activelearning/')) {
        sessionStorage.setItem(NEXT_SAMPLE, answerOf(this).SeriesInstanceUID);
      }
    });
    return send.apply(this, body);
  };
  XMLHttpRequest.prototype.send.watched = true;
}

function answerOf({ responseType, response }) {
  if (responseType === 'json') return response;
  return JSON.parse(responseType === 'arraybuffer' ? new TextDecoder().decode(response) : response);
}
